"""How large the pictures of a base model are: the one rule that training, its plan and `finetune data` go by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune import families
from finetune.config import ModelConfig
from finetune.errors import ConfigError
from finetune.families.places import check_place

if TYPE_CHECKING:
    from finetune.families import Components, ModelFamily

SMALL = 4
"""Up to this many usual steps, sides grow in the smallest steps that the networks allow."""


def training_size(family: ModelFamily, components: Components, resolution: int | None) -> tuple[int, int]:
    """(side of a square picture, step in which the sides of buckets grow), pixels.

    Args:
        resolution: the side if the user named one; None takes the base's own.

    Raises:
        ConfigError: the side is no multiple of the step.
    """
    side = resolution or family.native_resolution(components)
    small = side <= family.bucket_multiple * SMALL
    step = family.smallest_multiple(components) if small else family.bucket_multiple
    if side % step:
        raise ConfigError(
            f"data.resolution={side} is no multiple of {step} pixels, in which {family.name} buckets grow; "
            f"use {side // step * step} or {(side // step + 1) * step}."
        )
    return side, step


def base_training_size(base: str, resolution: int | None) -> tuple[int, int]:
    """`training_size` of a base model of which no weight is read.

    Args:
        base: demo, a diffusers folder or a .safetensors file.

    Raises:
        ConfigError: there is no such base on this disk, or its family is not known.
    """
    check_place(base)
    found = families.outline(ModelConfig(base=base))
    if found is None:
        raise ConfigError(
            f"base={base} is not on this disk, and nothing is fetched for this; name its folder or file, or give the "
            "resolution: 512 for SD1.x, 768 for SD2.x, 1024 for SDXL, SD3 and Flux."
        )
    return training_size(*found, resolution)
