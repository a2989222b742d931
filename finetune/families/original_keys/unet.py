"""The UNet of Stable Diffusion 1, 2, XL and the refiner: blocks are numbered straight through.

Source: CompVis/latent-diffusion and Stability-AI/generative-models, openaimodel.py, `UNetModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.original_keys.place import Place

ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Layers outside the blocks."""
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block; those of attention blocks have the same names on both sides."""
MIDDLE = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}


def original(name: str, config: Mapping[str, Any]) -> Place:
    """The place of a diffusers `UNet2DConditionModel` parameter."""
    module, _, leaf = name.rpartition(".")
    if module in ENDS:
        return Place(f"{ENDS[module]}.{leaf}")
    kind, _, rest = name.partition(".")
    if kind == "mid_block":
        part, index, inner = rest.split(".", 2)
        return Place(f"middle_block.{MIDDLE[part, index]}.{_inner(part, inner)}")
    block, part, index, inner = rest.split(".", 3)
    layers = int(config["layers_per_block"])
    if kind == "down_blocks":
        first = int(block) * (layers + 1) + 1
        if part == "downsamplers":
            return Place(f"input_blocks.{first + layers}.0.op.{inner.removeprefix('conv.')}")
        return Place(f"input_blocks.{first + int(index)}.{_slot(part)}.{_inner(part, inner)}")
    first = int(block) * (layers + 1)
    if part == "upsamplers":
        slot = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
        return Place(f"output_blocks.{first + layers}.{slot}.{inner}")
    return Place(f"output_blocks.{first + int(index)}.{_slot(part)}.{_inner(part, inner)}")


def _slot(part: str) -> int:
    return 0 if part == "resnets" else 1


def _inner(part: str, inner: str) -> str:
    if part == "attentions":
        return inner
    layer, _, leaf = inner.rpartition(".")
    return f"{RESNET[layer]}.{leaf}"
