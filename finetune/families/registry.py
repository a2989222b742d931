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


def outline(model: ModelConfig) -> tuple[ModelFamily, Components] | None:
    """The base without a weight: its denoiser and autoencoder on the meta device, no text encoders. None for a hub id.

    Raises:
        ConfigError: if the base is of no family here.
    """
    found = _configs(model)
    if found is None:
        return None
    family, configs = found
    denoiser, vae = (skeleton.empty_network(configs[name]) for name in ("denoiser", "vae"))
    return family, Components(denoiser, vae, {}, {}, {}, source=Path(model.base).name, digest="")


def network_configs(model: ModelConfig) -> Mapping[str, Mapping[str, Any]] | None:
    """What the base's networks are configured as, the denoiser under that name and all others under their pipeline's;
    no weight is read. None for a hub id, which is fetched first.

    Raises:
        ConfigError: if the base is of no family here.
    """
    found = _configs(model)
    return None if found is None else found[1]


def _configs(model: ModelConfig) -> tuple[ModelFamily, dict[str, dict[str, Any]]] | None:
    path = Path(model.base).expanduser()
    if path.is_file() and path.suffix == loading.FILE:
        found = detect_family(path)
        family = FAMILIES[found.family]
        own = model.skeleton or originals.of_embedded(read_header(path))
        shape = skeleton.of_folder(own) if own else originals.shipped(family, found, Choices())
    else:
        folder = places.names_folder(model.base)
        if folder is None:
            return None
        family, shape = folders.detect(FAMILIES, folder, model.base), skeleton.of_folder(folder)
    return family, {"denoiser" if name == family.denoiser else name: config for name, config in shape.networks.items()}


def denoiser_config(model: ModelConfig) -> Mapping[str, Any] | None:
    """What the base's denoiser is configured as; see `network_configs`."""
    configs = network_configs(model)
    return None if configs is None else configs["denoiser"]


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
