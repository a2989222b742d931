"""From "demo", a diffusers folder, a single file or a hub id to `Components`. Safetensors only; works offline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars

from finetune.families import folders, originals
from finetune.families.base import Components, ModelFamily, Reading
from finetune.families.choices import Choices
from finetune.families.holding import hold
from finetune.families.parts import Loaded

FILE = ".safetensors"


def load(
    families: Mapping[str, ModelFamily],
    base: str,
    dtype: torch.dtype | None,
    revision: str | None,
    variant: str | None,
    choices: Choices,
) -> tuple[ModelFamily, Components]:
    """Load a base model in `dtype` (None: as stored; its autoencoder in fp32) and say which family it is.

    Raises:
        ConfigError: if there is no such base, it has no safetensors, no family here knows it, or a choice contradicts
            it; whatever can be found at once is reported at once.
    """
    _quiet()
    path = Path(base).expanduser()
    if path.suffix == FILE and not path.is_dir():
        loaded = originals.load(families, path, dtype, choices)
    else:
        folder = folders.local_folder(base, revision, variant)
        loaded = folders.load(families, folder, base, dtype, variant, choices)
    family = _as_read(loaded, choices.reading)
    for name, tokenizer in loaded.tokenizers.items():
        _true_end_mark(loaded.networks[name], tokenizer)
    networks = dict(loaded.networks)
    digests = {"denoiser" if name == family.denoiser else name: value for name, value in loaded.digests.items()}
    components = Components(
        denoiser=hold(networks.pop(family.denoiser), choices.storage, dtype or torch.float32),
        vae=networks.pop("vae"),
        text_encoders={name: networks[name] for name in family.text_encoders if name in networks},
        tokenizers={name: loaded.tokenizers[name] for name in family.text_encoders if name in networks},
        scheduler_config=loaded.scheduler,
        source=path.resolve().name if path.exists() else base,
        digest=hashlib.sha256("".join(digests[key] for key in sorted(digests)).encode()).hexdigest(),
        digests=digests,
        pipeline_config=loaded.pipeline,
        notes=(*loaded.notes, *family.notes(loaded.configs[family.denoiser], loaded.scheduler)),
    )
    for module in components.modules().values():
        module.requires_grad_(False).eval()
    return family, components


def _quiet() -> None:
    """The libraries' bars for loading would tear ours apart; those for downloads stay."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    enable_progress_bars()


def _as_read(loaded: Loaded, asked: Reading) -> ModelFamily:
    """The family, told how this checkpoint's prompts are read."""
    family = loaded.family
    return replace(
        family,
        reading=replace(
            asked,
            zero_empty=bool(loaded.pipeline.get("force_zeros_for_empty_prompt")),
            width=loaded.configs[family.denoiser].get("joint_attention_dim"),
        ),
    )


def _true_end_mark(encoder: Any, tokenizer: Any) -> None:
    """Let a CLIP encoder find the end of the text by its own mark.

    Old configurations say eos_token_id=2, and transformers then takes the highest id in the text for the end: right
    until a learned token has a higher one.
    """
    module = getattr(encoder, "text_model", encoder)
    if getattr(module, "eos_token_id", None) == 2:
        module.eos_token_id = tokenizer.eos_token_id
