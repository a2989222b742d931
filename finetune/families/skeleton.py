"""What a single file does not hold: configurations, noise schedule, tokenizers. Shipped for every published shape.

The configurations are our own small JSON; CLIP's vocabulary is OpenAI's (MIT, see clip_merges.LICENSE). T5's
tokenizer is not shipped.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from finetune.errors import ConfigError

FOLDER = Path(__file__).parent / "skeletons"
CLIP_LENGTH = 77


@dataclass(frozen=True)
class Skeleton:
    """A base model without its weights.

    Attributes:
        pipeline: switches of the pipeline, as in `model_index.json`.
        networks: pipeline name -> the network's configuration.
        scheduler: the noise schedule.
        tokenizers: text encoder -> what to build, {"kind": "clip", ...}, or the folder that holds it.
    """

    pipeline: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    tokenizers: dict[str, dict[str, Any] | Path]


def shipped(name: str) -> Skeleton:
    """One that comes with this package."""
    return Skeleton(**json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def of_folder(folder: Path) -> Skeleton:
    """The skeleton of a diffusers folder; its weights, if it has any, are not looked at.

    Raises:
        ConfigError: if configurations are missing.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ConfigError(
            f"model.skeleton={folder} has no model_index.json; name a folder in diffusers' layout with the "
            "configurations and tokenizers of this model (weights are not needed)."
        )
    index = _json(index_file)
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
    networks = {p: _json(folder / p / "config.json") for p in parts if (folder / p / "config.json").is_file()}
    tokenizers: dict[str, dict[str, Any] | Path] = {
        part.replace("tokenizer", "text_encoder"): folder / part for part in parts if part.startswith("tokenizer")
    }
    return Skeleton(
        pipeline={key: value for key, value in index.items() if not isinstance(value, list)},
        networks=networks,
        scheduler=_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizers=tokenizers,
    )


def empty_network(config: dict[str, Any]) -> nn.Module:
    """The network of a configuration, its weights on the meta device: they cost no memory yet."""
    if "_class_name" in config:
        # keep: all of diffusers' buffers stand in files; SD3's table of places takes gigabytes and seconds to compute.
        with torch.device("meta"):
            built: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        assert not any(part._non_persistent_buffers_set for part in built.modules()), "no file would fill them"
    else:
        with init_empty_weights(include_buffers=False):
            kind = getattr(transformers, config["architectures"][0])
            built = kind(kind.config_class(**config))
    return built


def tokenizer(what: dict[str, Any] | Path, component: str) -> Any:
    """The tokenizer of one text encoder.

    Raises:
        ConfigError: for T5's, which is not shipped.
    """
    if isinstance(what, Path):
        return transformers.AutoTokenizer.from_pretrained(what, local_files_only=True)
    if what["kind"] != "clip":
        raise ConfigError(
            f"the tokenizer of {component} (T5) does not come with this package and not with a single file;",
            [
                "set model.skeleton to a diffusers folder of the same model: its model_index.json, config files and "
                "tokenizer folders are enough, the weights are taken from the file (--set model.skeleton=FOLDER)"
            ],
        )
    vocabulary, merges = _clip_vocabulary()
    return transformers.CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), pad_token=what["pad_token"], model_max_length=CLIP_LENGTH
    )


@lru_cache(maxsize=1)
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary, derived from its merges.

    Source: Radford et al. 2021, CLIP, and openai/CLIP, clip/simple_tokenizer.py: 256 byte characters, the same as ends
    of words, one piece per merge, two marks.
    """
    lines = gzip.decompress((FOLDER / "clip_merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = _byte_characters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _byte_characters() -> list[str]:
    """A printable character for every byte: printable Latin-1 stands for itself and comes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
