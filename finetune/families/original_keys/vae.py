"""The autoencoder of every family here. Its attention is written as 1x1 convolutions, its upward levels back to front.

Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py, `Encoder` and `Decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.original_keys.place import Place

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
MIDDLE = {"resnets.0": "mid.block_1", "attentions.0": "mid.attn_1", "resnets.1": "mid.block_2"}


def original(name: str, config: Mapping[str, Any]) -> Place:
    """The place of a diffusers `AutoencoderKL` parameter."""
    side, _, rest = name.partition(".")
    if side not in {"encoder", "decoder"}:
        return Place(name)
    if rest.startswith("mid_block."):
        part, index, inner = rest.removeprefix("mid_block.").split(".", 2)
        where = f"{side}.{MIDDLE[f'{part}.{index}']}"
        if part == "attentions":
            layer, _, leaf = inner.rpartition(".")
            form = "same" if layer == "group_norm" else "convolution"
            return Place(f"{where}.{ATTENTION[layer]}.{leaf}", form=form)
        return Place(f"{where}.{_shortcut(inner)}")
    if rest.startswith(("down_blocks.", "up_blocks.")):
        kind, block, part, index, inner = rest.split(".", 4)
        way = kind.removesuffix("_blocks")
        level = int(block) if way == "down" else len(config["block_out_channels"]) - 1 - int(block)
        if part in {"downsamplers", "upsamplers"}:
            return Place(f"{side}.{way}.{level}.{part.removesuffix('rs')}.{inner}")
        return Place(f"{side}.{way}.{level}.block.{index}.{_shortcut(inner)}")
    return Place(f"{side}.{rest.replace('conv_norm_out', 'norm_out')}")


def _shortcut(inner: str) -> str:
    return inner.replace("conv_shortcut", "nin_shortcut")
