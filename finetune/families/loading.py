"""From "demo", a diffusers folder or a hub id to `Components`. Safetensors only; works without a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from finetune.demo import BASE_DIR
from finetune.errors import ConfigError, UnsafeError
from finetune.families.base import Components, ModelFamily
from finetune.storage import sha256_file

DEMO = "demo"
"""The name of the embedded base model."""


def load(
    families: Mapping[str, ModelFamily], base: str, dtype: torch.dtype, revision: str | None, variant: str | None
) -> tuple[ModelFamily, Components]:
    """Load a base model in `dtype` (its autoencoder in fp32) and say which family it is.

    Raises:
        ConfigError: if there is no such base, it has no safetensors, or no family here knows it.
    """
    folder = local_folder(base, revision, variant)
    family = detect(families, folder, base)
    # keep: VAE encoders overflow in fp16 on bright pictures; the autoencoder stays in fp32.
    dtypes = {"vae": torch.float32, "default": dtype}
    _quiet()
    try:
        pipeline: Any = getattr(diffusers, family.pipeline_class).from_pretrained(
            folder, dtype=dtypes, variant=variant, use_safetensors=True, safety_checker=None, local_files_only=True
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
    text_encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
    tokenizers = {name: getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in family.text_encoders}
    digests = _digests(family, folder, variant)
    components = Components(
        denoiser=getattr(pipeline, family.denoiser),
        vae=pipeline.vae,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        scheduler_config=dict(pipeline.scheduler.config),
        source=Path(base).expanduser().resolve().name if Path(base).expanduser().is_dir() else base,
        digest=hashlib.sha256("".join(digests[key] for key in sorted(digests)).encode()).hexdigest(),
        digests=digests,
    )
    for module in components.modules().values():
        module.requires_grad_(False).eval()
    return family, components


def local_folder(base: str, revision: str | None, variant: str | None) -> Path:
    """The folder on this disk that holds the base, fetched from the hub when `base` is a hub id."""
    if base == DEMO:
        return BASE_DIR
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ConfigError(
                f"model.base={base} is a folder without model_index.json, so it is no diffusers pipeline folder; "
                "name the folder that save_pretrained wrote."
            )
        return folder
    if folder.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise UnsafeError(
            f"model.base={base} is a pickled checkpoint, which can run code when opened, so it is not opened here; "
            "get the .safetensors of the same model, or convert it on a machine you can afford to lose."
        )
    if folder.is_file() or folder.suffix == ".safetensors":
        raise ConfigError(
            f"model.base={base} is a single file, which cannot be read here yet; convert it once with diffusers' "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(folder) and name that folder."
        )
    try:
        fetched = diffusers.DiffusionPipeline.download(base, revision=revision, variant=variant, use_safetensors=True)
    except Exception as error:  # the hub client raises many kinds; each becomes one message with the cause
        raise ConfigError(
            f"model.base={base} is neither a folder here nor a hub id that can be fetched:",
            [
                f"{type(error).__name__}: {_first_line(error)}",
                "check the spelling; for a gated model run `hf auth login` first; without a network, fetch it where "
                "there is one (`hf download ...`) and name the folder",
            ],
        ) from error
    return Path(str(fetched))


def detect(families: Mapping[str, ModelFamily], folder: Path, base: str) -> ModelFamily:
    """The family that recognises the pipeline folder, judged from its configuration files alone."""
    index = json.loads((folder / "model_index.json").read_text())
    for family in families.values():
        config_file = folder / family.denoiser / "config.json"
        if config_file.is_file() and family.matches(index, json.loads(config_file.read_text())):
            return family
    raise ConfigError(
        f"model.base={base} is a {index.get('_class_name')}, which no family here can train; "
        f"known families: {', '.join(families)}."
    )


def _digests(family: ModelFamily, folder: Path, variant: str | None) -> dict[str, str]:
    """SHA-256 per part over the weight files that were loaded, its configuration and, for text, its tokenizer."""
    parts = {"denoiser": family.denoiser, "vae": "vae", **{name: name for name in family.text_encoders}}
    found = {}
    for key, subfolder in parts.items():
        # keep: a hub folder may hold several variants of one part; only what was loaded counts.
        every = sorted((folder / subfolder).glob("*.safetensors"))
        own = [file for file in every if variant and f".{variant}" in file.name]
        files = own or [file for file in every if file.name.count(".") == 1]
        files += sorted((folder / subfolder).glob("config.json"))
        if key in family.text_encoders:
            tokenizer = folder / subfolder.replace("text_encoder", "tokenizer")
            files += [file for file in sorted(tokenizer.glob("*")) if file.suffix in {".json", ".txt"}]
        found[key] = hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
    return found


def _quiet() -> None:
    """The libraries' own progress bars would tear ours apart; loading takes a moment and has one line of ours."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
