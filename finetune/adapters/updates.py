"""What each adapter method makes of a layer's weight, written out once and independent of the library that trains it.

Export, sampling and every file conversion read adapters through this table, so a method is what its formula
here says; tests compare each formula with PEFT's own layers.

Notation: W is the layer's weight seen as a matrix (out, in * kh * kw), s is `AdapterFile.scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of one layer, by suffix: what follows the layer's name in an adapter file."""
Options = Mapping[str, Any]
"""What a method needs besides tensors and scale; `AdapterHeader.options`."""

LORA = frozenset({"lora_A.weight", "lora_B.weight"})
HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
KRON = tuple(
    frozenset({*left, *right})
    for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
)


def lora(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """W + s B A. Source: Hu et al. 2021, LoRA, arXiv:2106.09685; rsLoRA (arXiv:2312.03732) differs in s alone."""
    return weight + scale * _low_rank(tensors).reshape(weight.shape)


def dora(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """m (W + s B A) / |W + s B A|, with one magnitude m and one Euclidean norm per output.

    Source: Liu et al. 2024, DoRA, arXiv:2402.09353, eq. 5, in PEFT's reading: norms are taken over rows of W.
    """
    direction = lora(tensors, weight, scale, options).flatten(1)
    magnitude = tensors["lora_magnitude_vector"].reshape(-1, 1)
    return (magnitude / direction.norm(dim=1, keepdim=True) * direction).reshape(weight.shape)


def loha(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """W + s (A1 B1) * (A2 B2), the product * taken element by element.

    With cores T the factors are CP decompositions of a whole kernel: sum_ij T[i, j] A[i, out] B[j, in].

    Source: Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098, propositions 1 and 3.
    """
    left, right = (_hada_factor(tensors, number) for number in ("1", "2"))
    return weight + scale * (left * right).reshape(weight.shape)


def lokr(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """W + s (C kron D), C and D whole or as products of two thin matrices.

    Source: Yeh et al. 2023, LyCORIS, arXiv:2309.14859, section 3; Edalati et al. 2022, KronA, arXiv:2212.10650.
    """
    left = _kron_factor(tensors, "lokr_w1")
    if "lokr_t2" in tensors:
        right = torch.einsum(
            "ijkl,ip,jr->prkl", tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        ).flatten(1)  # fmt: skip
    else:
        right = _kron_factor(tensors, "lokr_w2").flatten(1)
    # keep: the right factor's columns are (in, kh, kw), so a product of flattened factors is a flattened kernel.
    return weight + scale * torch.kron(left, right).reshape(weight.shape)


def oft(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """W R^T with R block-diagonal and orthogonal: R = (I - Q)(I + Q)^-1, Q skew-symmetric.

    `oft_R.weight` holds the upper triangles of the blocks' Q, shape (blocks, b (b - 1) / 2). The option "cayley_terms"
    = n >= 4 means that R was the first n terms of the series of that inverse instead, as PEFT does by default.

    Source: Qiu et al. 2023, OFT, arXiv:2306.07280; the series: Qiu et al. 2025, OFTv2, arXiv:2506.19847.
    """
    upper = tensors["oft_R.weight"]
    size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    skew = upper.new_zeros(upper.shape[0], size, size)
    skew[:, rows, columns] = upper
    return _rotated(weight, _cayley(skew - skew.transpose(1, 2), int(options.get("cayley_terms", 0))))


def boft(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """g W R^T with one gain g per output, R block-diagonal as in `oft`, Q = (P - P^T) / 2.

    `boft_R` has shape (1, blocks, b, b): one butterfly factor, which is all that PEFT computes without a compiler.

    Source: Liu et al. 2023, BOFT, arXiv:2311.06243.
    """
    factors, *_ = tensors["boft_R"].shape
    if factors != 1:
        raise ValueError(f"boft_R has {factors} butterfly factors, and only one is supported")
    blocks = tensors["boft_R"][0]
    rotated = _rotated(weight, _cayley((blocks - blocks.transpose(1, 2)) / 2, 0))
    return rotated * tensors["boft_s"].reshape(-1, *[1] * (weight.ndim - 1))


def ia3(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """W with one gain per input, or, where `ia3_l` has shape (out, 1), one per output.

    Source: Liu et al. 2022, (IA)^3, arXiv:2205.05638, eq. 1.
    """
    gains = tensors["ia3_l"]
    if per_output(gains):
        return weight * gains.reshape(-1, *[1] * (weight.ndim - 1))
    return weight * gains.reshape(1, -1, *[1] * (weight.ndim - 2))


def full(tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """The file's own weight, or W where the file holds this layer's bias alone."""
    return tensors.get("weight", weight).reshape(weight.shape)


@dataclass(frozen=True)
class Update:
    """How a method changes a layer.

    Attributes:
        merged: the new weight from (tensors, weight, scale, options).
        layouts: the sets of suffixes of which a layer must hold exactly one; empty: any tensors of the layer itself.
        scaled: whether alpha and rank mean anything; if not, the scale is 1.
        rank: the rank that a layer's tensors show; None where they do not.
    """

    merged: Callable[[Tensors, Tensor, float, Options], Tensor]
    layouts: tuple[frozenset[str], ...]
    scaled: bool = True
    rank: Callable[[Tensors], int | None] = lambda tensors: None


def _lora_rank(tensors: Tensors) -> int | None:
    down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return down.shape[0] if up.ndim >= 2 and up.shape[1] == down.shape[0] else -1


def _loha_rank(tensors: Tensors) -> int | None:
    return tensors["hada_w1_b"].shape[0]


_LORA = Update(lora, (LORA,), rank=_lora_rank)
UPDATES: dict[str, Update] = {
    "lora": _LORA,
    "locon": _LORA,
    "rslora": _LORA,
    "dora": Update(dora, (LORA | {"lora_magnitude_vector"},), rank=_lora_rank),
    "loha": Update(loha, (HADA, HADA | {"hada_t1", "hada_t2"}), rank=_loha_rank),
    "lokr": Update(lokr, KRON),
    "oft": Update(oft, (frozenset({"oft_R.weight"}),), scaled=False),
    "boft": Update(boft, (frozenset({"boft_R", "boft_s"}),), scaled=False),
    "ia3": Update(ia3, (frozenset({"ia3_l"}),), scaled=False),
    "full": Update(full, (), scaled=False),
}


def merged_weight(method: str, tensors: Tensors, weight: Tensor, scale: float, options: Options) -> Tensor:
    """The weight a layer has with the adapter in it.

    Args:
        method: name in UPDATES.
        tensors: of this layer, by suffix.
        weight: the base layer's; (out, in) or (out, in, kh, kw), or of any shape for "full".
        scale: what the update is multiplied by: `AdapterFile.scale`.
        options: `AdapterHeader.options`.

    Returns:
        shape of `weight`, on its device; in fp32, or in fp64 if `weight` is.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = {suffix: tensor.to(weight.device, dtype) for suffix, tensor in tensors.items()}
    return UPDATES[method].merged(wide, weight.detach().to(dtype), scale, options)


def merged_bias(method: str, tensors: Tensors, bias: Tensor | None) -> Tensor | None:
    """The bias a layer has with the adapter in it, in fp32 (or fp64); None if it has none.

    Only "full" and output gains of "ia3" change it.
    """
    if bias is None:
        return None
    dtype = torch.promote_types(bias.dtype, torch.float32)
    plain = bias.detach().to(dtype)
    if method == "full" and "bias" in tensors:
        return tensors["bias"].to(bias.device, dtype)
    if method == "ia3" and per_output(tensors["ia3_l"]):
        return plain * tensors["ia3_l"].to(bias.device, dtype).flatten()
    return plain


def per_output(gains: Tensor) -> bool:
    """Whether (IA)^3 gains belong to a layer's outputs: shape (out, 1). Ours are (1, in) and leave the bias alone."""
    return gains.ndim == 2 and gains.shape[0] != 1


def _low_rank(tensors: Tensors) -> Tensor:
    return tensors["lora_B.weight"].flatten(1) @ tensors["lora_A.weight"].flatten(1)


def _hada_factor(tensors: Tensors, number: str) -> Tensor:
    first, second = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    if f"hada_t{number}" not in tensors:
        return first @ second
    return torch.einsum("ijkl,ip,jr->prkl", tensors[f"hada_t{number}"], first, second)


def _kron_factor(tensors: Tensors, name: str) -> Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def _cayley(skew: Tensor, terms: int) -> Tensor:
    """(I - Q)(I + Q)^-1 for blocks (n, b, b); with `terms`, PEFT's series I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if not terms:
        return torch.linalg.solve(one + skew, one - skew, left=False)
    total, power = one.clone(), one
    for number in range(1, terms):
        power = power @ skew
        total = total + power * (1.0 if number == terms - 1 and number > 1 else 2.0)
    return total


def _rotated(weight: Tensor, blocks: Tensor) -> Tensor:
    """W R^T for a block-diagonal R given by its blocks (n, b, b)."""
    count, size, _ = blocks.shape
    split = weight.flatten(1).reshape(weight.shape[0], count, size)
    return torch.einsum("onb,ncb->onc", split, blocks).reshape(weight.shape)
