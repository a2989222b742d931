"""Low-rank algebra: products, differences and best approximations of updates, mostly without writing them out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.interchange.adapter import Update
from finetune.rng import rng

EXACT_SIDE = 768
"""Matrices with a side up to this are decomposed exactly; larger ones by random projection if few values are wanted."""
OVERSAMPLING, POWER_STEPS = 16, 4
"""Extra columns and power iterations of the random projection; its error is then within 1 % of the best possible."""
Factors = tuple[Tensor, Tensor]
"""(up, down): the matrix is up @ down."""


@dataclass(frozen=True)
class Decomposition:
    """A matrix as U diag(S) V, largest first, in fp64.

    Attributes:
        shape: of the layer's weight, which may have a kernel.
        squares: sum of the squares of all singular values, also of those that are left out.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    shape: tuple[int, ...]
    squares: float

    def update(self, rank: int, alpha: float | None = None) -> Update:
        """The best approximation of a rank, both factors of like size.

        Args:
            rank: at least 1; singular values beyond what there is are left out.
            alpha: what the update shall say; None means the rank, a scale of 1.
        """
        rank = max(1, min(rank, len(self.s)))
        scale = 1.0 if alpha is None else alpha / rank
        root = (self.s[:rank] / scale).sqrt()
        ones = [1] * (len(self.shape) - 2)
        down = (root[:, None] * self.v[:rank]).reshape(rank, *self.shape[1:]).float()
        up = (self.u[:, :rank] * root).reshape(self.shape[0], rank, *ones).float()
        return Update("lora", {"lora_A.weight": down.contiguous(), "lora_B.weight": up.contiguous()}, scale)

    def kept(self, rank: int) -> float:
        """Share of the Frobenius norm that the best approximation of a rank keeps; in [0, 1]."""
        if not self.squares:
            return 1.0
        return math.sqrt(min(1.0, float(self.s[:rank].square().sum()) / self.squares))


def of_factors(factors: Factors, shape: tuple[int, ...]) -> Decomposition:
    """Singular values of up @ down, of which nothing larger than the factors is ever written out."""
    up, down = (factor.double() for factor in factors)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Decomposition(left @ u, s, v @ right.T, shape, float(s.square().sum()))


def of_dense(matrix: Tensor, most: int | None, *key: str) -> Decomposition:
    """Singular values of a weight's change: all of them, or the largest `most` of a large matrix.

    Args:
        matrix: (out, in) or (out, in, kh, kw).
        most: how many are wanted; None means all.
        key: what the random projection is for, e.g. the layer's name; the same key gives the same result.

    Source: Halko, Martinsson, Tropp 2011, Finding structure with randomness, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    flat = matrix.flatten(1).double()
    squares = float(flat.square().sum())
    columns = (most or max(flat.shape)) + OVERSAMPLING
    if min(flat.shape) <= EXACT_SIDE or columns * 3 > min(flat.shape):
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        return Decomposition(u, s, v, tuple(matrix.shape), squares)
    start = torch.randn(flat.shape[1], columns, generator=rng(0, "projection", *key), dtype=torch.float64)
    basis = torch.linalg.qr(flat @ start)[0]
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(flat @ torch.linalg.qr(flat.T @ basis)[0])[0]
    u, s, v = torch.linalg.svd(basis.T @ flat, full_matrices=False)
    return Decomposition((basis @ u)[:, :most], s[:most], v[:most], tuple(matrix.shape), squares)


def factors_of(update: Update) -> Factors:
    """(up, down) of a low-rank update, scale in, as fp64 matrices."""
    up = update.tensors["lora_B.weight"].flatten(1).double() * update.scale
    return up, update.tensors["lora_A.weight"].flatten(1).double()


def decomposition(update: Update, *key: str, most: int | None = None) -> Decomposition:
    """Singular values of what an update adds to a weight; for updates that need no base."""
    if update.is_low_rank:
        up, down = update.tensors["lora_B.weight"], update.tensors["lora_A.weight"]
        return of_factors(factors_of(update), (up.shape[0], *down.shape[1:]))
    return of_dense(update.delta(), most, *key)


def product(left: Factors, right: Factors) -> float:
    """The sum over all elements of one product times the other: trace(B1' B2 A2 A1')."""
    return float(((left[0].T @ right[0]) * (left[1] @ right[1].T)).sum())


def inner(left: Update, right: Update) -> float:
    """The Euclidean inner product of two changes of one weight."""
    if left.is_low_rank and right.is_low_rank:
        return product(factors_of(left), factors_of(right))
    return float((left.delta().double().flatten() * right.delta().double().flatten()).sum())


def distance(left: Update, right: Update) -> tuple[float, float]:
    """(|left - right|, |left|), Frobenius; for updates that need the base, of their tensors instead."""
    if left.needs_base or right.needs_base:
        return _tensor_distance(left, right)
    if _identical(left, right):
        return 0.0, 1.0
    if left.is_low_rank and right.is_low_rank:
        (up, down), (other_up, other_down) = factors_of(left), factors_of(right)
        if torch.equal(down, other_down):
            lost = up - other_up, down
            return math.sqrt(max(0.0, product(lost, lost))), math.sqrt(max(0.0, product((up, down), (up, down))))
        stacked = torch.cat([up, -other_up], dim=1), torch.cat([down, other_down])
        return math.sqrt(max(0.0, _compressed(stacked))), math.sqrt(max(0.0, product((up, down), (up, down))))
    ours, theirs = left.delta().double().flatten(), right.delta().double().flatten()
    bias = _bias(left, ours), _bias(right, theirs)
    size = math.hypot(float(ours.norm()), float(bias[0].norm()))
    return math.hypot(float((ours - theirs).norm()), float((bias[0] - bias[1]).norm())), size


def _identical(left: Update, right: Update) -> bool:
    """The same numbers in the same roles; the size of such a change need not be known."""
    return (
        left.method == right.method
        and math.isclose(left.scale, right.scale, rel_tol=1e-12)
        and left.tensors.keys() == right.tensors.keys()
        and all(torch.equal(left.tensors[part].flatten(), right.tensors[part].flatten()) for part in left.tensors)
    )


def _compressed(factors: Factors) -> float:
    """|up @ down|^2 by way of QR, which does not lose a small difference of large products to cancellation."""
    upper = torch.linalg.qr(factors[0], mode="r")[1]
    lower = torch.linalg.qr(factors[1].T, mode="r")[1]
    return float((upper @ lower.T).square().sum())


def _bias(update: Update, like: Tensor) -> Tensor:
    return update.tensors.get("diff_b", like.new_zeros(1)).double()


def _tensor_distance(left: Update, right: Update) -> tuple[float, float]:
    if left.method != right.method or set(left.tensors) != set(right.tensors):
        return math.inf, 1.0
    pairs = [(left.tensors[name].double(), right.tensors[name].double()) for name in left.tensors]
    if any(ours.numel() != theirs.numel() for ours, theirs in pairs):
        return math.inf, 1.0
    if {"lora_A.weight", "lora_B.weight"} <= set(left.tensors):
        low = [Update("lora", update.tensors, update.scale) for update in (left, right)]
        pairs = [
            pair
            for name, pair in zip(left.tensors, pairs, strict=True)
            if not name.startswith("lora_") or "mag" in name
        ]
        lost, size = distance(*low)
        own = [(float((a.flatten() - b.flatten()).norm()), float(a.norm())) for a, b in pairs]
        return max([lost / (size or 1.0), *(d / (n or 1.0) for d, n in own)]), 1.0
    lost = math.sqrt(sum(float((ours.flatten() - theirs.flatten()).square().sum()) for ours, theirs in pairs))
    return lost, math.sqrt(sum(float(ours.square().sum()) for ours, _ in pairs)) or 1.0


RankRule = Callable[[Tensor], int]
"""Singular values, largest first -> how many to keep."""


def fixed(rank: int) -> RankRule:
    """The same rank for every layer."""
    return lambda values: rank


def energy(share: float) -> RankRule:
    """As few as hold a share of the sum of squares."""
    return lambda values: _first(values.square().cumsum(0) / values.square().sum().clamp_min(1e-300), share)


def frobenius(share: float) -> RankRule:
    """As few as hold a share of the Frobenius norm: the root of the sum of squares."""
    return energy(share**2)


def ratio(largest: float) -> RankRule:
    """Those of at least 1 / `largest` of the largest one."""
    return lambda values: int((values * largest >= values[0]).sum())


def _first(shares: Tensor, share: float) -> int:
    return int((shares < share - 1e-12).sum()) + 1


__all__ = [
    "Decomposition", "RankRule", "decomposition", "distance", "energy", "factors_of", "fixed", "frobenius", "inner",
    "of_dense", "of_factors", "product", "ratio",
]  # fmt: skip
