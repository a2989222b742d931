"""How much each noise level counts in the loss.

A weighting gets (alpha, sigma, x0_gain, gamma), the first three of shape (B,), and returns the weight of the
prediction's own squared error, shape (B,). A weighting defined on the error in x_0, as min-SNR is, multiplies
by `x0_gain`, the squared error in x_0 per squared error of the prediction; so one formula is right for every
prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import Kind, snr


@dataclass(frozen=True)
class Weighting:
    """A weighting and the kinds of schedule it is defined for."""

    weight: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    schedules: tuple[Kind, ...] = ("ddpm", "flow")


def none(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, gamma: float) -> Tensor:
    """1: the prediction's own error counts the same at every noise level."""
    return torch.ones_like(alpha)


def min_snr(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) on the error in x_0: nearly clean pictures pull no more than those at SNR = gamma.

    On the prediction's own error that is min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, and itself for
    x_0. For flow it is min((1 - sigma)^2, gamma * sigma^2).

    Source: Hang et al. 2023, Min-SNR weighting, arXiv:2303.09556; the paper uses gamma = 5.
    """
    return snr(alpha, sigma).clamp(max=gamma) * x0_gain


def sigma_sqrt(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, gamma: float) -> Tensor:
    """1 / sigma^2, for sigma >= 0.001, the smallest noise level of the published schedules.

    Source: diffusers.training_utils.compute_loss_weighting_for_sd3, applied to the velocity's error as in its
        Flux script.
    """
    return sigma.clamp(min=1e-3) ** -2


def cosmap(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, gamma: float) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): the cosmap density as a weight.

    Source: arXiv:2403.03206, section 3.1.
    """
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


WEIGHTINGS: dict[str, Weighting] = {
    "none": Weighting(none),
    "min_snr": Weighting(min_snr),
    "sigma_sqrt": Weighting(sigma_sqrt, schedules=("flow",)),
    "cosmap": Weighting(cosmap, schedules=("flow",)),
}
