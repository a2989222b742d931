"""ControlNets: the front half of a denoiser, what looks at the control picture, and one layer per answer.

Sources: lllyasviel/ControlNet, cldm/cldm.py, `ControlNet`; XLabs-AI/x-flux, src/flux/controlnet.py, `ControlNetFlux`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.original_keys import flux, unet
from finetune.families.original_keys.place import Place

FLUX_LOOKS = 4
"""Widths of the layers that look at the control picture, in XLabs' files."""


def of_unet(name: str, config: Mapping[str, Any]) -> Place:
    """The place of a diffusers `ControlNetModel` parameter."""
    module, _, leaf = name.rpartition(".")
    kind, _, rest = module.partition(".")
    if kind == "controlnet_cond_embedding":
        return Place(f"input_hint_block.{_looks(rest, len(config['conditioning_embedding_out_channels']))}.{leaf}")
    if kind == "controlnet_down_blocks":
        return Place(f"zero_convs.{rest}.0.{leaf}")
    if kind == "controlnet_mid_block":
        return Place(f"middle_block_out.0.{leaf}")
    return unet.original(name, config)


def of_flux(name: str, config: Mapping[str, Any]) -> Place:
    """The place of a diffusers `FluxControlNetModel` parameter in XLabs' files."""
    module, _, leaf = name.rpartition(".")
    kind, _, rest = module.partition(".")
    if kind == "controlnet_x_embedder":
        return Place(f"pos_embed_input.{leaf}")
    if kind == "input_hint_block":
        return Place(f"input_hint_block.{_looks(rest, FLUX_LOOKS)}.{leaf}")
    return Place(name) if kind == "controlnet_blocks" else flux.original(name, config)


def _looks(module: str, widths: int) -> int:
    """Number of a layer that looks at the control picture: every second one is an activation."""
    if module == "conv_in":
        return 0
    number = 2 * (widths - 1) if module == "conv_out" else int(module.removeprefix("blocks."))
    return 2 * (number + 1)
