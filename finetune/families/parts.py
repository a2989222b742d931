"""What loading finds, wherever it looked, and networks taken from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from data_tools.hub import only_fetched
from finetune.errors import ConfigError, UnsafeError
from finetune.families.base import ModelFamily, Reading
from finetune.families.choices import NONE, Choices
from finetune.families.places import FILE, HUB_ID
from finetune.families.single_file import DIFFUSERS_OWN, part_digest, part_from_file
from finetune.header import read_header
from finetune.storage import sha256_weights

PICKLED = {".ckpt", ".pt", ".pth", ".bin"}
"""Endings of files that can run code when opened."""


@dataclass(frozen=True)
class Loaded:
    """What was found under a base's name.

    Attributes:
        networks: pipeline name -> network.
        configs: pipeline name -> its configuration.
        tokenizers: text encoder -> tokenizer.
        scheduler: the checkpoint's noise schedule, settled with the user.
        pipeline: switches of its pipeline.
        digests: pipeline name -> SHA-256 over what decides that network.
        notes: what the user should know.
    """

    family: ModelFamily
    networks: dict[str, nn.Module]
    configs: Mapping[str, Mapping[str, Any]]
    tokenizers: dict[str, Any]
    scheduler: dict[str, Any]
    pipeline: dict[str, Any]
    digests: dict[str, str]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Replacement:
    """A network from elsewhere."""

    network: nn.Module
    config: Mapping[str, Any]
    digest: str


def replacements(
    family: ModelFamily, choices: Choices, configs: Mapping[str, dict[str, Any]], dtype: torch.dtype
) -> dict[str, Replacement | None]:
    """The networks that the user takes from elsewhere; None for one that is left out.

    Args:
        configs: the base's own configurations, for files that bring none.

    Raises:
        ConfigError: listing every choice that cannot be.
    """
    wanted = dict(choices.text_encoders) | ({"vae": choices.vae} if choices.vae else {})
    found: dict[str, Replacement | None] = {}
    problems = _unreadable(family, choices.reading, configs)
    for name, where in wanted.items():
        if name != "vae" and name not in family.text_encoders:
            problems.append(f"model.text_encoders names {name}; {family.name} has {', '.join(family.text_encoders)}")
        elif where == NONE and name not in family.optional_text_encoders:
            problems.append(f"model.text_encoders.{name}=none, but {family.name} cannot do without it")
        elif where == NONE:
            found[name] = None
        elif not problems:
            # keep: VAE encoders overflow in fp16 on bright pictures; the autoencoder stays in fp32.
            found[name] = _replacement(family, name, where, configs, torch.float32 if name == "vae" else dtype)
    if problems:
        raise ConfigError(f"The base model is a {family.name} and cannot be loaded as asked:", problems)
    return found


def _unreadable(family: ModelFamily, asked: Reading, configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Every choice about reading prompts that means nothing for this family."""
    problems = []
    for option, value in vars(asked).items():
        if value != getattr(Reading(), option) and option not in family.reading_options:
            offered = ", ".join(f"model.{name}" for name in sorted(family.reading_options))
            problems.append(f"model.{option}={value} means nothing for {family.name}; it offers {offered}")
    layers = [int(config["num_hidden_layers"]) for config in configs.values() if "num_hidden_layers" in config]
    if asked.clip_skip and layers and asked.clip_skip > min(layers):
        problems.append(f"model.clip_skip={asked.clip_skip} is more than the {min(layers)} layers of a text encoder")
    return problems


def replaced_configs(others: Mapping[str, Replacement | None]) -> dict[str, Mapping[str, Any]]:
    """Configurations of the networks that come from elsewhere."""
    return {name: part.config for name, part in others.items() if part is not None}


def replaced_digests(others: Mapping[str, Replacement | None]) -> dict[str, str]:
    """Digests of the networks that come from elsewhere."""
    return {name: part.digest for name, part in others.items() if part is not None}


def _replacement(
    family: ModelFamily, name: str, where: str, configs: Mapping[str, dict[str, Any]], dtype: torch.dtype
) -> Replacement:
    path = Path(where).expanduser()
    if path.suffix in PICKLED:
        raise UnsafeError(f"{where} is a pickled file, which can run code when opened; get its .safetensors.")
    if path.is_file():
        layouts = [family.original[name], DIFFUSERS_OWN]
        network = part_from_file(read_header(path), name, configs[name], layouts, dtype)
        return Replacement(network, configs[name], part_digest(sha256_weights(path), name, configs[name]))
    key = "model.vae" if name == "vae" else f"model.text_encoders.{name}"
    if not path.exists() and (path.suffix == FILE or not HUB_ID.fullmatch(where)):
        raise ConfigError(
            f"{key}={where} is neither a folder nor a file here, nor a hub id, which has the form owner/name; check "
            "the spelling."
        )
    folder = path / name if (path / name / "config.json").is_file() else path
    kind = _kind(configs[name])
    try:
        place = str(folder) if path.is_dir() else where
        network = kind.from_pretrained(place, use_safetensors=True, dtype=dtype, local_files_only=only_fetched(place))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{key}={where} cannot be loaded: {str(error).strip().splitlines()[0].rstrip('.')}; name a folder, a "
            ".safetensors file or a hub id of that part alone; without a network only what `hf download` has fetched "
            "before."
        ) from None
    config = json.loads(json.dumps(dict(network.config) if name == "vae" else network.config.to_dict(), default=str))
    files = sorted(folder.glob("*.safetensors")) if path.is_dir() else []
    digest = part_digest("".join(map(sha256_weights, files)) or where, name, config)
    return Replacement(network, config, digest)


def _kind(config: Mapping[str, Any]) -> Any:
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"])
    return getattr(transformers, config["architectures"][0])
