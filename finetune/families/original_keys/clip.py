"""Text encoders: transformers' names as they are, or OpenCLIP's.

Source: mlfoundations/open_clip, src/open_clip/transformer.py, `TextTransformer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune.families.original_keys.place import Place

LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def plain(name: str, config: Mapping[str, Any]) -> Place:
    """The place in files that keep transformers' names: CLIP-L everywhere, bigG and T5 in SD3 files."""
    return Place(name)


def unprojected(name: str, config: Mapping[str, Any]) -> Place:
    """The place of SD3's CLIP-L, whose pooled output is not projected: readers ignore a projection.

    Source: Stability-AI/sd3-ref, other_impls.py; diffusers' single-file loader puts the identity there.
    """
    return Place(name, form="identity" if name == "text_projection.weight" else "same")


def open_clip(name: str, config: Mapping[str, Any]) -> Place:
    """The place of a `CLIPTextModel` parameter in OpenCLIP's own names."""
    if name == "text_projection.weight":
        return Place("text_projection", form="transposed")
    inner = name.removeprefix("text_model.")
    if inner.startswith("embeddings."):
        kind = inner.split(".")[1]
        return Place("token_embedding.weight" if kind == "token_embedding" else "positional_embedding")
    if inner.startswith("final_layer_norm."):
        return Place(inner.replace("final_layer_norm", "ln_final"))
    _, _, number, rest = inner.split(".", 3)
    layer, _, leaf = rest.rpartition(".")
    where = f"transformer.resblocks.{number}"
    if layer in FUSED:
        return Place(f"{where}.attn.in_proj_{leaf}", FUSED.index(layer))
    return Place(f"{where}.{LAYER[layer]}.{leaf}")


def surplus(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a layer beyond those that are loaded: SD2 reads 23 of OpenCLIP's 24 layers."""
    layer = re.match(r"transformer\.resblocks\.(\d+)\.", name)
    return layer is not None and int(layer.group(1)) >= int(config.get("num_hidden_layers", 0))
