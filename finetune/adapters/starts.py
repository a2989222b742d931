"""How an adapter's tensors start: a function of the run's seed, the tensor's name and the layer's weight alone.

PEFT's own starts draw from the global generator, so they would depend on what was built before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune.rng import rng

Draw = Callable[[str], torch.Generator]
"""A generator for one purpose of one tensor."""

OVERSAMPLING = 8
POWER_ITERATIONS = 8
"""Of the randomised SVD: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4, section 4.5 for the numbers."""


def uniform(parameter: Tensor, weight: Tensor, draw: Draw) -> Tensor:
    """Uniform in +-1/sqrt(fan in): Kaiming's with a = sqrt 5, PEFT's choice for every random tensor."""
    bound = parameter[0].numel() ** -0.5
    return (torch.rand(parameter.shape, generator=draw("")) * 2 - 1) * bound


def zeros(parameter: Tensor, weight: Tensor, draw: Draw) -> Tensor:
    """All zero: one factor of every product, so that a fresh adapter changes nothing."""
    return torch.zeros(parameter.shape)


def ones(parameter: Tensor, weight: Tensor, draw: Draw) -> Tensor:
    """All one: gains."""
    return torch.ones(parameter.shape)


def row_norms(parameter: Tensor, weight: Tensor, draw: Draw) -> Tensor:
    """The length of each output's weights: DoRA's magnitudes."""
    norms = torch.linalg.norm(weight.detach().float().flatten(1), dim=1)
    return norms.reshape(parameter.shape)


STARTS: dict[str, Callable[[Tensor, Tensor, Draw], Tensor]] = {
    "lora_A.weight": uniform,
    "lora_B.weight": zeros,
    "lora_magnitude_vector": row_norms,
    "hada_w1_a": uniform,
    "hada_w1_b": uniform,
    "hada_w2_a": uniform,
    "hada_w2_b": zeros,
    "hada_t1": uniform,
    "hada_t2": uniform,
    "lokr_w1": zeros,
    "lokr_w1_a": zeros,
    "lokr_w1_b": uniform,
    "lokr_w2": uniform,
    "lokr_w2_a": uniform,
    "lokr_w2_b": uniform,
    "lokr_t2": uniform,
    "oft_R.weight": zeros,
    "boft_R": zeros,
    "boft_s": ones,
    "ia3_l": ones,
}
"""suffix -> its start."""


def gaussian(weight: Tensor, rank: int, scale: float, draw: Draw) -> tuple[Tensor, Tensor]:
    """A normal with standard deviation 1 / rank, B zero."""
    return torch.randn(rank, weight.shape[1], generator=draw("A")) / rank, torch.zeros(weight.shape[0], rank)


def orthogonal(weight: Tensor, rank: int, scale: float, draw: Draw) -> tuple[Tensor, Tensor]:
    """A and B both random, in halves of the rank that are orthogonal to each other, so that B A = 0 up to rounding.

    Source: PEFT, LoraLayer.orthogonal_init; the rank must be even.
    """
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw("basis"), dtype=torch.float64))
    down = basis[0::2].T @ torch.randn(rank // 2, weight.shape[1], generator=draw("A"), dtype=torch.float64)
    up = torch.randn(weight.shape[0], rank // 2, generator=draw("B"), dtype=torch.float64) @ basis[1::2]
    return (down / 10).float(), (up / 10).float()


def pissa(weight: Tensor, rank: int, scale: float, draw: Draw) -> tuple[Tensor, Tensor]:
    """The `rank` strongest directions of W: U sqrt(S / scale) and sqrt(S / scale) V^T, by a randomised SVD.

    Source: Meng et al. 2024, PiSSA, arXiv:2404.02948.
    """
    wide = weight.double().cpu()
    width = min(rank + OVERSAMPLING, *wide.shape)
    sketch = torch.randn(wide.shape[1], width, generator=draw("sketch"), dtype=torch.float64)
    basis, _ = torch.linalg.qr(wide @ sketch)
    for _ in range(POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(wide.T @ basis)
        basis, _ = torch.linalg.qr(wide @ basis)
    left, values, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    # keep: the sign of a direction is the library's choice; ours makes its largest number positive.
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    left, right = left * signs.T, right * signs
    root = (values[:rank] / scale).sqrt()
    return (root[:, None] * right[:rank]).float(), (basis @ left[:, :rank] * root).float()


def olora(weight: Tensor, rank: int, scale: float, draw: Draw) -> tuple[Tensor, Tensor]:
    """The first `rank` columns of Q and rows of R of W = Q R.

    Source: Buyukakyuz 2024, OLoRA, arXiv:2406.01775.
    """
    q, r = torch.linalg.qr(weight.double().cpu())
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    q, r = q * signs, r * signs[:, None]
    return r[:rank].float().contiguous(), q[:, :rank].float().contiguous()


INITS: dict[str, Callable[[Tensor, int, float, Draw], tuple[Tensor, Tensor]]] = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
"""init -> (A, B) from the layer's weight as a matrix, rank and scale; "default" is in STARTS."""
SUBTRACTED = ("pissa", "olora")
"""Starts whose product is not zero: it is subtracted beside the layer, so that the base's weights stay as they are."""


def start(suffix: str, name: str, parameter: Tensor, weight: Tensor, seed: int) -> Tensor:
    """The start of the tensor called `name`; shape of `parameter`, fp32."""
    # keep: the plain name is what runs of earlier versions drew with.
    return STARTS[suffix](parameter, weight, lambda purpose: rng(seed, "adapter start", name + purpose))


def start_factors(
    init: str, name: str, down: Tensor, up: Tensor, weight: Tensor, scale: float, seed: int
) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the layer called `name`, in the shapes of `down` and `up`, fp32."""
    matrix = weight.detach().flatten(1).float()
    first, second = INITS[init](
        matrix, down.shape[0], scale, lambda purpose: rng(seed, f"adapter start {init}", name, purpose)
    )
    return first.reshape(down.shape), second.reshape(up.shape)
