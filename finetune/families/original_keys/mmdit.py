"""The transformer of Stable Diffusion 3 and 3.5: q, k and v are one matrix, scale and shift change places at two ends.

Source: Stability-AI/sd3-ref, mmdit.py, `MMDiT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.original_keys.place import Place

ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", 0),
    "attn.norm_q": ("x_block.attn.ln_q", 0),
    "attn.norm_k": ("x_block.attn.ln_k", 0),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn.to_add_out": ("context_block.attn.proj", 0),
    "attn.norm_added_q": ("context_block.attn.ln_q", 0),
    "attn.norm_added_k": ("context_block.attn.ln_k", 0),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn2.to_out.0": ("x_block.attn2.proj", 0),
    "attn2.norm_q": ("x_block.attn2.ln_q", 0),
    "attn2.norm_k": ("x_block.attn2.ln_k", 0),
    "norm1.linear": ("x_block.adaLN_modulation.1", 0),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", 0),
    "ff.net.0.proj": ("x_block.mlp.fc1", 0),
    "ff.net.2": ("x_block.mlp.fc2", 0),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", 0),
    "ff_context.net.2": ("context_block.mlp.fc2", 0),
}
"""Layer of a block -> (layer in the file, part of it)."""


def original(name: str, config: Mapping[str, Any]) -> Place:
    """The place of a diffusers `SD3Transformer2DModel` parameter."""
    module, _, leaf = name.rpartition(".")
    if name == "pos_embed.pos_embed":
        return Place("pos_embed")
    if module == "norm_out.linear":
        return Place(f"final_layer.adaLN_modulation.1.{leaf}", form="swapped")
    if module in ENDS:
        return Place(f"{ENDS[module]}.{leaf}")
    _, block, layer = module.split(".", 2)
    theirs, part = BLOCK[layer]
    # keep: the last block's text half only normalises; diffusers then uses the layer that takes (scale, shift).
    last = layer == "norm1_context.linear" and int(block) == int(config["num_layers"]) - 1
    return Place(f"joint_blocks.{block}.{theirs}.{leaf}", part, "swapped" if last else "same")
