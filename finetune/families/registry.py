"""The families by name, and how a base model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from finetune.config import ModelConfig
from finetune.families import folders, loading, originals, places, skeleton
from finetune.families.base import Components, ModelFamily, Reading
from finetune.families.choices import Choices
from finetune.families.detect import detect_family
from finetune.families.flux import Flux
from finetune.families.sd import SD1, SD2
from finetune.families.sd3 import SD3
from finetune.families.sdxl import SDXL, SDXLRefiner
from finetune.header import read_header

FAMILIES: MappingProxyType[str, ModelFamily] = MappingProxyType(
    {family.name: family for family in (SD1(), SD2(), SDXL(), SDXLRefiner(), SD3(), Flux())}
)
"""Every family, with nothing chosen."""


def load_family(
    base: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    choices: Choices | None = None,
) -> tuple[ModelFamily, Components]:
    """Load a base model and say what it is.

    Args:
        base: "demo" (the embedded base), a diffusers folder, a single .safetensors file, or a hub id.
        dtype: number format of the denoiser and the text encoders; the autoencoder is always fp32. None leaves half
            precision as it is stored, and makes fp32 of all else.
        revision: branch, tag or commit of a hub id.
        variant: file variant inside the base, e.g. "fp16".
        choices: what else was chosen; None chooses nothing.

    Raises:
        ConfigError: if the base cannot be found, is not safetensors, or is of no family here.
    """
    return loading.load(FAMILIES, base, dtype, revision, variant, choices or Choices())


def denoiser_config(model: ModelConfig) -> Mapping[str, Any] | None:
    """What the base's denoiser is configured as, read without a weight; None for a hub id, which is fetched first.

    Raises:
        ConfigError: if the base is of no family here.
    """
    path = Path(model.base).expanduser()
    if path.is_file() and path.suffix == loading.FILE:
        found = detect_family(path)
        family = FAMILIES[found.family]
        own = model.skeleton or originals.of_embedded(read_header(path))
        shape = skeleton.of_folder(own) if own else originals.shipped(family, found, Choices())
        return shape.networks[family.denoiser]
    folder = places.names_folder(model.base)
    if folder is None:
        return None
    return skeleton.of_folder(folder).networks[folders.detect(FAMILIES, folder, model.base).denoiser]


def load_model(
    model: ModelConfig, dtype: torch.dtype | None = torch.float32, *, whole: bool = False
) -> tuple[ModelFamily, Components]:
    """Load the base model of a run, with everything the run chose about it.

    Args:
        dtype: see `load_family`.
        whole: hold all weights as they compute, whatever `model.storage` says; export computes with them.
    """
    choices = Choices(
        vae=model.vae,
        text_encoders=model.text_encoders,
        skeleton=model.skeleton,
        prediction=model.prediction,
        zero_terminal_snr=model.zero_terminal_snr,
        reading=Reading(
            clip_skip=model.clip_skip,
            prompt_chunks=model.prompt_chunks,
            t5_tokens=model.t5_tokens,
            guidance=model.guidance,
        ),
        storage="full" if whole else model.storage,
    )
    return load_family(model.base, dtype=dtype, revision=model.revision, variant=model.variant, choices=choices)
