"""Base models. The only package that knows a family's name; to add one, write its file and name it in FAMILIES."""

from __future__ import annotations

from types import MappingProxyType

import torch

from finetune.families import loading
from finetune.families.base import Components, Conditioning, Latents, ModelFamily, SizeConditioning
from finetune.families.sd import SD1

FAMILIES: MappingProxyType[str, ModelFamily] = MappingProxyType({family.name: family for family in (SD1(),)})


def load_family(
    base: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None, variant: str | None = None
) -> tuple[ModelFamily, Components]:
    """Load a base model and say what it is.

    Args:
        base: "demo" (the embedded base), a diffusers folder, or a hub id.
        dtype: number format of the denoiser and the text encoders; the autoencoder is always fp32.
        revision: branch, tag or commit of a hub id.
        variant: file variant inside the base, e.g. "fp16".

    Raises:
        ConfigError: if the base cannot be found, is not safetensors, or is of no family here.
    """
    return loading.load(FAMILIES, base, dtype, revision, variant)


__all__ = ["FAMILIES", "Components", "Conditioning", "Latents", "ModelFamily", "SizeConditioning", "load_family"]
