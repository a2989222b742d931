"""The price of an error, element by element, and its average over one picture.

Each loss gets (prediction, target, delta), the first two of one shape and in float32, and returns that shape. delta is
where a loss turns from squared to linear, in units of the prediction; a number, or (B, 1, ...) when it follows the
noise level (`DELTA_SCHEDULES`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def mse(prediction: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """(prediction - target)^2."""
    return (prediction - target) ** 2


def l1(prediction: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """|prediction - target|."""
    return (prediction - target).abs()


def huber(prediction: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """Pseudo-Huber 2 delta (sqrt(d^2 + delta^2) - delta): d^2 for small errors d, 2 delta |d| for large ones.

    Its small errors cost what they cost under `mse`, so the learning rate may stay.

    Source: Khrapov et al. 2024, arXiv:2403.16728; the same formula as `conditional_loss` in sd-scripts.
    """
    return delta * smooth_l1(prediction, target, delta)


def smooth_l1(prediction: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """2 (sqrt(d^2 + delta^2) - delta): d^2 / delta for small errors d, 2 |d| for large ones.

    Source: as for `huber`.
    """
    # The difference of roots as a quotient: exact where d is far below delta, where subtracting would cancel.
    squared = (prediction - target) ** 2
    return 2 * squared / ((squared + delta**2).sqrt() + delta)


def log_cosh(prediction: Tensor, target: Tensor, delta: float | Tensor) -> Tensor:
    """2 delta^2 log cosh(d / delta): d^2 for small errors d, 2 delta |d| - 2 delta^2 log 2 for large ones.

    As `huber`, small errors cost what they cost under `mse`; it is smooth to every order.

    Source: Chen et al. 2019, Log hyperbolic cosine loss, with the scale delta.
    """
    x = (prediction - target).abs() / delta
    # keep: log cosh x = x - log 2 + log(1 + exp(-2 x)) cancels for small x, where the series is exact to 1e-9 instead.
    small = x.clamp(max=0.05)
    series = small**2 / 2 - small**4 / 12 + small**6 / 45
    direct = x - math.log(2.0) + torch.nn.functional.softplus(-2 * x)
    return 2 * delta**2 * torch.where(x < 0.05, series, direct)


LOSSES: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "smooth_l1": smooth_l1,
    "log_cosh": log_cosh,
}
WITH_DELTA = ("huber", "smooth_l1", "log_cosh")
"""Losses that read delta."""


def constant_delta(alpha: Tensor, sigma: Tensor, share: Tensor, delta: float) -> Tensor:
    """delta at every noise level."""
    return torch.full_like(alpha, delta)


def snr_delta(alpha: Tensor, sigma: Tensor, share: Tensor, delta: float) -> Tensor:
    """(1 - delta) / (1 + sigma / alpha)^2 + delta: 1 for a clean picture, delta for noise.

    Source: Khrapov et al. 2024, arXiv:2403.16728, section 4.2.
    """
    # keep: 1 / (1 + sigma / alpha) = alpha / (alpha + sigma), which is finite at alpha = 0.
    return (1 - delta) * (alpha / (alpha + sigma)) ** 2 + delta


def exponential_delta(alpha: Tensor, sigma: Tensor, share: Tensor, delta: float) -> Tensor:
    """delta ^ (t / T): 1 for a clean picture, delta for noise.

    Source: as `snr_delta`.
    """
    return torch.exp(share * math.log(delta))


DELTA_SCHEDULES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "constant": constant_delta,
    "snr": snr_delta,
    "exponential": exponential_delta,
}
"""(alpha, sigma, t / T, delta) -> delta of each picture, (B,): how it follows the noise level."""


def mean_per_picture(errors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average errors of shape (B, C, h, w) to shape (B,).

    Args:
        mask: how much each place counts, in [0, 1], broadcasting to `errors`, usually (B, 1, h, w). The
            average is taken over the masked-in area, so a picture with a small mask counts as much as any
            other. An empty mask gives 0.
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    mask = mask.to(errors.dtype).expand_as(errors)
    return (errors * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-8)
