"""Names of layers in the original model files, derived from the names that diffusers gives them.

An original layer may hold several diffusers layers on top of each other (a fused qkv), or their rows in another order.
So every original name stands for pieces: rows of layers, from top to bottom.

Sources: the module trees of CompVis/latent-diffusion and Stability-AI/generative-models (openaimodel.py),
    Stability-AI/sd3-ref (mmdit.py) and black-forest-labs/flux (model.py, layers.py); a test holds the tables
    against diffusers' own converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of the output of a layer."""

    component: str
    module: str
    start: int
    stop: int


Rows = tuple[str, int, int]
Fused = dict[str, list[Rows]]
"""Original name -> (diffusers name, first row, row after the last), from top to bottom."""

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_MMDIT_ENDS = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip
_MMDIT_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_BFL_ENDS = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip
_BFL_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mod.lin": ("norm1.linear",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_BFL_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_BFL_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}  # fmt: skip
_BFL_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}  # fmt: skip


def same(layers: Mapping[str, Shape]) -> Fused:
    """Text encoders as transformers names them."""
    return {name: [(name, 0, shape[0])] for name, shape in layers.items()}


def ldm(layers: Mapping[str, Shape]) -> Fused:
    """The UNet of latent diffusion: one list of input blocks, one of output blocks."""
    depth = 1 + max(int(match[1]) for name in layers if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)", name)))
    attentive = {match[0] for name in layers if (match := re.match(r"up_blocks\.\d+\.attentions", name))}

    def block(match: re.Match[str]) -> str:
        side, number, kind, index = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            position = number * (depth + 1) + (depth + 1 if kind == "downsamplers" else index + 1)
            return f"input_blocks.{position}." + {"resnets": "0.", "attentions": "1.", "downsamplers": "0."}[kind]
        position = number * (depth + 1) + (depth if kind == "upsamplers" else index)
        after = 2 if f"up_blocks.{number}.attentions" in attentive else 1
        return f"output_blocks.{position}." + {"resnets": "0.", "attentions": "1.", "upsamplers": f"{after}."}[kind]

    middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    named: Fused = {}
    for name, shape in layers.items():
        original = _UNET_ENDS.get(name, name)
        original = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", block, original)
        original = re.sub(r"^mid_block\.(\w+\.\d+)\.", lambda match: f"middle_block.{middle[match[1]]}.", original)
        stem, _, leaf = original.rpartition(".")
        if ".resnets." in name:
            original = f"{stem}.{_RESNET[leaf]}"
        elif "downsamplers" in name:
            original = f"{stem}.op"
        named[original] = [(name, 0, shape[0])]
    return named


def mmdit(layers: Mapping[str, Shape]) -> Fused:
    """Stability's multimodal diffusion transformer, with q, k and v in one layer."""
    named = _fused(layers, "", "", _MMDIT_ENDS.items())
    blocks = _numbers(layers, "transformer_blocks")
    for number in blocks:
        named |= _fused(layers, f"joint_blocks.{number}.", f"transformer_blocks.{number}.", _MMDIT_BLOCK.items())
    # keep: diffusers keeps (scale, shift) where the original keeps (shift, scale): at the end, and in the last block's
    # context, which has no more than these two.
    swapped = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    if blocks:
        last = max(blocks)
        context = f"transformer_blocks.{last}.norm1_context.linear"
        swapped[f"joint_blocks.{last}.context_block.adaLN_modulation.1"] = context
    return named | _swapped(layers, swapped)


def bfl(layers: Mapping[str, Shape]) -> Fused:
    """Black Forest Labs' transformer: double and single blocks, with q, k, v (and the MLP) in one layer."""
    named = _fused(layers, "", "", _BFL_ENDS.items())
    for number in _numbers(layers, "transformer_blocks"):
        named |= _fused(layers, f"double_blocks.{number}.", f"transformer_blocks.{number}.", _BFL_DOUBLE.items())
    for number in _numbers(layers, "single_transformer_blocks"):
        named |= _fused(layers, f"single_blocks.{number}.", f"single_transformer_blocks.{number}.", _BFL_SINGLE.items())
    return named | _swapped(layers, {"final_layer.adaLN_modulation.1": "norm_out.linear"})


def bfl_norms(layers: Mapping[str, Shape]) -> Fused:
    """Black Forest Labs' norms of queries and keys, which no program changes by an adapter under these names."""
    named: Fused = {}
    for number in _numbers(layers, "transformer_blocks"):
        named |= _fused(layers, f"double_blocks.{number}.", f"transformer_blocks.{number}.", _BFL_NORMS.items())
    for number in _numbers(layers, "single_transformer_blocks"):
        own = f"single_transformer_blocks.{number}."
        named |= _fused(layers, f"single_blocks.{number}.", own, _BFL_SINGLE_NORMS.items())
    return named


def open_clip(layers: Mapping[str, Shape]) -> Fused:
    """OpenCLIP's text tower, with q, k and v in one parameter.

    Its text projection is stored the other way round than transformers does and is left out.
    """
    named: Fused = {}
    for number in _numbers(layers, r"text_model\.encoder\.layers"):
        own, block = f"text_model.encoder.layers.{number}.", f"transformer.resblocks.{number}."
        named |= _fused(layers, block, own, _OPEN_CLIP_BLOCK.items())
    return named | _fused(layers, "", "text_model.", {"ln_final": "final_layer_norm"}.items())


STYLES: dict[str, Callable[[Mapping[str, Shape]], Fused]] = {
    "same": same,
    "ldm": ldm,
    "mmdit": mmdit,
    "bfl": bfl,
    "open_clip": open_clip,
}
"""How a network's original file names its layers; the tables of `names` say which applies."""
SCALED: dict[str, Callable[[Mapping[str, Shape]], Fused]] = {"bfl": bfl_norms}
"""Style -> layers that only its checkpoints name, and whose weight they call `scale`."""


def _numbers(layers: Mapping[str, Shape], stem: str) -> list[int]:
    return sorted({int(match[1]) for name in layers if (match := re.match(rf"{stem}\.(\d+)\.", name))})


def _fused(layers: Mapping[str, Shape], before: str, own: str, table: Iterable[tuple[str, Any]]) -> Fused:
    """Entries of a table whose layers all exist."""
    named: Fused = {}
    for original, parts in table:
        names = [own + part for part in ((parts,) if isinstance(parts, str) else parts)]
        if all(name in layers for name in names):
            named[before + original] = [(name, 0, layers[name][0]) for name in names]
    return named


def _swapped(layers: Mapping[str, Shape], table: Mapping[str, str]) -> Fused:
    named: Fused = {}
    for original, name in table.items():
        if name in layers:
            rows = layers[name][0]
            named[original] = [(name, rows // 2, rows), (name, 0, rows // 2)]
    return named
