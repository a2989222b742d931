"""How much an adapter changes a layer, from the numbers in its file; without torch, for `finetune inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from finetune.header import Tensors
from finetune.interchange.layouts import Layer

Floats = NDArray[np.float64]


def change_norm(layer: Layer, tensors: Tensors, scale: float) -> tuple[float, int] | None:
    """(Frobenius norm of the change, number of weights changed); None where the base or nobody can tell.

    For DoRA it is that of s B A, the part that turns directions. Parts that make no update together are named by
    whatever reads them to convert them.
    """
    try:
        return _norm(layer, tensors, scale)
    except (KeyError, ValueError, IndexError):
        return None


def _norm(layer: Layer, tensors: Tensors, scale: float) -> tuple[float, int] | None:
    part = {name: np.asarray(tensors.array(key), dtype=np.float64) for name, key in layer.parts.items()}
    if {"lora_A.weight", "lora_B.weight"} <= set(part) and "lora_mid.weight" not in part:
        down, up = (_matrix(part[name]) for name in ("lora_A.weight", "lora_B.weight"))
        if down.shape[0] != up.shape[1]:
            return None
        # |B A|^2 = trace(B'B A A'), which needs only rank by rank matrices.
        squared = float(np.sum((up.T @ up) * (down @ down.T)))
        return abs(scale) * math.sqrt(max(0.0, squared)), up.shape[0] * down.shape[1]
    if layer.method == "loha" and "hada_t1" not in part:
        change = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return abs(scale) * float(np.linalg.norm(change)), change.size
    if layer.method == "lokr" and "lokr_t2" not in part:
        left, right = (_kron_factor(part, name) for name in ("lokr_w1", "lokr_w2"))
        # |C kron D| = |C| |D|.
        return abs(scale) * float(np.linalg.norm(left) * np.linalg.norm(right)), left.size * right.size
    if layer.method == "diff" and "diff" in part:
        return float(np.linalg.norm(part["diff"])), part["diff"].size
    return None


def _matrix(array: Floats) -> Floats:
    return array.reshape(array.shape[0], -1)


def _kron_factor(part: Mapping[str, Floats], name: str) -> Floats:
    return part[name] if name in part else part[f"{name}_a"] @ part[f"{name}_b"]
