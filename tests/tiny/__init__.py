"""Tiny models with random weights for tests: the twins of every family, and adapters for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from finetune.adapters.files import DOWN, UP, AdapterFile, AdapterHeader
from finetune.families.base import Components, ModelFamily
from finetune.families.text import canonical
from finetune.families.twins import RESOLUTION, TWINS, write_twin


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write SD1's twin as a diffusers folder; `prediction_type` as the checkpoint's scheduler says."""
    return write_twin("sd1", folder, prediction_type=prediction_type)


BUILDERS = {name: partial(write_twin, name) for name in TWINS}
"""Family -> what writes its twin to a folder."""


def random_adapter(
    family: ModelFamily,
    components: Components,
    *,
    rank: Mapping[str, int],
    alpha: Mapping[str, float],
    preset: str = "all",
    strength: float = 0.05,
) -> AdapterFile:
    """A LoRA whose two factors are both noise, so that it changes the model a lot and any error shows.

    Args:
        rank: pipeline name of a network -> width; networks left out are not changed.
        alpha: the same names -> strength.
        preset: name in `family.target_presets`.
        strength: standard deviation of lora_B.
    """
    noise = torch.Generator().manual_seed(3)
    tensors = {}
    for component, width in rank.items():
        is_denoiser = component == family.denoiser
        network = components.denoiser if is_denoiser else components.text_encoders[component]
        pattern = family.target_presets[preset]["denoiser" if is_denoiser else component]
        for name, layer in network.named_modules():
            if re.fullmatch(pattern, name):
                key = f"{component}.{canonical(network, component, name)}"
                out, *inner = layer.weight.shape
                ones = [1] * (len(inner) - 1)
                tensors[key + DOWN] = torch.randn(width, *inner, generator=noise) * 0.1
                tensors[key + UP] = torch.randn(out, width, *ones, generator=noise) * strength
    header = AdapterHeader(
        family=family.name,
        base=components.source,
        base_digest=components.digest,
        method=dict.fromkeys(rank, "lora"),
        rank=dict(rank),
        alpha=dict(alpha),
        trigger_words=("sks toy",),
        run_digest="ab" * 32,
        step=100,
    )
    return AdapterFile(tensors, header)


__all__ = ["BUILDERS", "RESOLUTION", "TWINS", "random_adapter", "tiny_pipeline", "write_twin"]
