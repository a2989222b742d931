"""Base models as diffusers folders, on this disk or fetched from the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError

from data_tools.hub import only_fetched
from finetune.errors import ConfigError, UnsafeError
from finetune.families.base import ModelFamily
from finetune.families.choices import Choices
from finetune.families.detect import other_inputs
from finetune.families.parts import Loaded, replaced_configs, replaced_digests, replacements
from finetune.families.places import check_place, names_folder
from finetune.families.said import Said, settled
from finetune.families.skeleton import of_folder
from finetune.header import read_header
from finetune.storage import sha256_weights

FLOATS = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number format of a file -> what its numbers are held in where nothing else is asked for."""
REASONS = {
    "GatedRepoError": "its owner asks for terms to be accepted: do so on its page, then `hf auth login`",
    "RevisionNotFoundError": "it has no such branch, tag or commit; model.revision names one",
    "RepositoryNotFoundError": "there is no such repository, or it is private: check the spelling, or `hf auth login`",
}
"""What the hub's client raises -> what it means, the most special first."""
UNREACHED = "the hub cannot be reached"
UNFETCHED = (
    "there is no network (or HF_HUB_OFFLINE is set), and it was not fetched before. Where there is one, "
    "`hf download {base} --local-dir FOLDER` fetches it; then name that folder, or any single .safetensors of the "
    "model. Check the spelling if it should be a folder here"
)


def local_folder(base: str, revision: str | None, variant: str | None) -> Path:
    """The folder on this disk that holds the base, fetched from the hub when `base` is a hub id.

    Raises:
        ConfigError: if there is no such folder and it cannot be fetched.
        UnsafeError: for a pickled checkpoint.
    """
    check_place(base)
    if (here := names_folder(base)) is not None:
        return here
    offline = only_fetched(base)
    try:
        fetched = diffusers.DiffusionPipeline.download(
            base, revision=revision, variant=variant, use_safetensors=True, local_files_only=offline
        )
    except Exception as error:  # the hub client raises many kinds; each becomes one message with the cause
        raise ConfigError(
            f"model.base={base} is neither a folder or file here nor a hub id that can be fetched:",
            [UNFETCHED.format(base=base) if offline else _unfetched(error)],
        ) from error
    return Path(str(fetched))


def _unfetched(error: BaseException) -> str:
    """Why the hub gave nothing; diffusers' own words are about its arguments, the cause stands behind them."""
    root = error
    while (before := root.__cause__ or root.__context__) is not None:
        root = before
    kinds = [kind.__name__ for link in (error, error.__cause__) if link for kind in type(link).__mro__]
    reason = next((told for name, told in REASONS.items() if name in kinds), UNREACHED)
    return f"{reason} ({type(root).__name__}: {_first_line(root)})"


def load(
    families: Mapping[str, ModelFamily],
    folder: Path,
    base: str,
    dtype: torch.dtype | None,
    variant: str | None,
    choices: Choices,
) -> Loaded:
    """Every network of a pipeline folder in `dtype` (None: as stored), the autoencoder in fp32."""
    if choices.skeleton is not None:
        raise ConfigError(f"model.skeleton is for single files; {base} is a folder and brings its own; leave it out.")
    family = detect(families, folder, base)
    shape = of_folder(folder)
    configs = shape.networks
    said = Said(
        _prediction(shape.scheduler), shape.scheduler.get("rescale_betas_zero_snr"), "scheduler/scheduler_config.json"
    )
    settled(said, shape.scheduler, base, choices)
    others = replacements(family, choices, configs, dtype or torch.float32)
    given = {name: part.network if part else None for name, part in others.items()}
    given |= {name.replace("text_encoder", "tokenizer"): None for name, part in others.items() if part is None}
    # keep: VAE encoders overflow in fp16 on bright pictures; the autoencoder stays in fp32.
    names = [family.denoiser, "vae", *family.text_encoders]
    stored = {name: dtype or _stored(_weight_files(folder / name, variant)) for name in names}
    dtypes = stored | {"vae": torch.float32, "default": torch.float32}
    if "safety_checker" in index(folder):
        given["safety_checker"] = None
    try:
        pipeline: Any = getattr(diffusers, family.pipeline_for(configs[family.denoiser])).from_pretrained(
            folder, dtype=dtypes, variant=variant, use_safetensors=True, local_files_only=True, **given
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"model.base={base} cannot be loaded:",
            [
                f"{_first_line(error)}; only safetensors are read (a .bin or .ckpt can run code); convert "
                "it with diffusers' save_pretrained(safe_serialization=True). "
                f"model.variant={variant or 'null'} names the files that are looked for: fp16 for *.fp16.safetensors, "
                "null for plain ones"
            ],
        ) from None
    networks = {name: getattr(pipeline, name) for name in names if getattr(pipeline, name) is not None}
    lost = [n for n in names if n not in networks and n not in family.optional_text_encoders]
    if lost:
        raise ConfigError(f"model.base={base} lacks {', '.join(lost)}; fetch the whole folder again.")
    return Loaded(
        family=family,
        networks=networks,
        configs={name: configs[name] for name in networks} | replaced_configs(others),
        tokenizers={
            name: getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            for name in family.text_encoders
            if name in networks
        },
        scheduler=settled(said, pipeline.scheduler.config, base, choices),
        pipeline=_switches(pipeline),
        digests=_digests(family, folder, variant, networks) | replaced_digests(others),
    )


def detect(families: Mapping[str, ModelFamily], folder: Path, base: str) -> ModelFamily:
    """The family that recognises the pipeline folder, judged from its configuration files alone."""
    found = index(folder)
    unet: dict[str, Any] = {}
    for family in families.values():
        config_file = folder / family.denoiser / "config.json"
        if config_file.is_file():
            config = _document(config_file)
            if family.matches(found, config):
                return family
            unet = config if family.denoiser == "unet" else unet
    if unet.get("in_channels") != unet.get("out_channels"):
        raise ConfigError(f"model.base={base} {other_inputs(unet['in_channels'], unet['out_channels'])}")
    raise ConfigError(
        f"model.base={base} is a {found.get('_class_name')}, which no family here can train; "
        f"known families: {', '.join(families)}."
    )


def index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` says.

    Raises:
        ConfigError: if it cannot be read.
        UnsafeError: if it asks for code of its own.
    """
    found = _document(folder / "model_index.json")
    if not isinstance(found.get("_class_name"), str):
        raise UnsafeError(
            f"{folder / 'model_index.json'} names the pipeline {found.get('_class_name')!r}: code that comes with a "
            "model is never run here; use a base of a class that diffusers has."
        )
    return found


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}; fetch the base again.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings; fetch the base again.")
    return found


def _prediction(scheduler: Mapping[str, Any]) -> str | None:
    """What a scheduler's configuration says of the prediction, in our names; diffusers' own default is epsilon."""
    if "FlowMatch" in str(scheduler.get("_class_name", "")):
        return "flow"
    return str(scheduler.get("prediction_type") or "epsilon")


def _switches(pipeline: Any) -> dict[str, Any]:
    """The pipeline's own settings, without its components."""
    own = {key: value for key, value in pipeline.config.items() if not key.startswith("_")}
    return {key: value for key, value in own.items() if isinstance(value, bool | int | float | str)}


def _digests(family: ModelFamily, folder: Path, variant: str | None, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 per part over the weight files that were loaded, its configuration and, for text, its tokenizer."""
    found = {}
    for name in names:
        files = _weight_files(folder / name, variant)
        files += sorted((folder / name).glob("config.json"))
        if name in family.text_encoders:
            tokenizer = folder / name.replace("text_encoder", "tokenizer")
            files += [file for file in sorted(tokenizer.glob("*")) if file.suffix in {".json", ".txt"}]
        found[name] = hashlib.sha256("".join(sha256_weights(file) for file in files).encode()).hexdigest()
    return found


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Those that are loaded: a hub folder may hold several variants of one part."""
    every = sorted(folder.glob("*.safetensors"))
    own = [file for file in every if variant and f".{variant}" in file.name]
    return own or [file for file in every if file.name.count(".") == 1]


def _stored(files: Iterable[Path]) -> torch.dtype:
    """Half precision if every number is in it, so that nothing is rounded; else fp32."""
    formats = {entry.dtype for file in files for entry in read_header(file).tensors.values()} & FLOATS.keys()
    return FLOATS[formats.pop()] if len(formats) == 1 else torch.float32


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
