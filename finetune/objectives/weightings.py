"""How much each noise level counts in the loss.

A weighting gets (alpha, sigma, x0_gain, parameters), the first three of shape (B,), and returns the weight of the
prediction's own squared error, shape (B,). A weighting defined on the error in x_0, as min-SNR is, multiplies
by `x0_gain`, the squared error in x_0 per squared error of the prediction; so one formula is right for every
prediction. One defined on the error in the noise first becomes one on x_0, by a factor SNR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import Kind, snr

SMALLEST_SIGMA = 1e-3
"""The smallest noise level of the published schedules; below it formulas that divide by sigma stop growing."""


@dataclass(frozen=True)
class WeightParameters:
    """Shape of a weighting; each one reads what it needs.

    Attributes:
        snr_gamma: min_snr, soft_min_snr: the cap, on the scale of the signal-to-noise ratio; positive.
        p2_gamma: p2: how strongly clean pictures are held back; 0 turns it off.
        p2_k: p2: the signal-to-noise ratio at which that sets in; positive.
    """

    snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0


@dataclass(frozen=True)
class Weighting:
    """A weighting and the kinds of schedule it is defined for."""

    weight: Callable[[Tensor, Tensor, Tensor, WeightParameters], Tensor]
    schedules: tuple[Kind, ...] = ("ddpm", "flow")


def none(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """1: the prediction's own error counts the same at every noise level."""
    return torch.ones_like(alpha)


def min_snr(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """min(SNR, gamma) on the error in x_0: nearly clean pictures pull no more than those at SNR = gamma.

    On the prediction's own error that is min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, and itself for
    x_0. For flow it is min((1 - sigma)^2, gamma * sigma^2).

    Source: Hang et al. 2023, Min-SNR weighting, arXiv:2303.09556; the paper uses gamma = 5.
    """
    return snr(alpha, sigma).clamp(max=parameters.snr_gamma) * x0_gain


def soft_min_snr(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """SNR gamma / (SNR + gamma) on the error in x_0: min-SNR without its corner, half the cap at SNR = gamma.

    Source: Crowson et al. 2024, Hourglass Diffusion Transformers, arXiv:2401.11605, section 4.4, whose
        1 / (sigma^2 + 1) over x_0 is gamma = 1 here.
    """
    gamma = parameters.snr_gamma
    return gamma * alpha**2 / (alpha**2 + gamma * sigma**2) * x0_gain


def debiased(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """1 / sqrt(SNR) on the error in the noise: large noise, which decides the layout, counts more.

    That is sqrt(SNR) on the error in x_0, and sqrt(SNR) / (SNR + 1) on that of v. (sd-scripts uses 1 / (SNR + 1) for v,
    which is another weighting.)

    Source: Yu et al. 2023, Debias the training of diffusion models, arXiv:2310.08442, equation 12.
    """
    return alpha / sigma.clamp(min=SMALLEST_SIGMA) * x0_gain


def p2(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """1 / (k + SNR)^gamma on the error in the noise: details that nobody sees count less.

    That is SNR / (k + SNR)^gamma on the error in x_0.

    Source: Choi et al. 2022, Perception prioritized training, arXiv:2204.00227, equation 8; k = 1, gamma = 0.5 or 1.
    """
    ratio = snr(alpha, sigma.clamp(min=SMALLEST_SIGMA))
    return ratio / (parameters.p2_k + ratio) ** parameters.p2_gamma * x0_gain


def sigma_sqrt(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """1 / sigma^2, for sigma >= 0.001, the smallest noise level of the published schedules.

    Source: diffusers.training_utils.compute_loss_weighting_for_sd3, applied to the velocity's error as in its
        Flux script.
    """
    return sigma.clamp(min=SMALLEST_SIGMA) ** -2


def cosmap(alpha: Tensor, sigma: Tensor, x0_gain: Tensor, parameters: WeightParameters) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): the cosmap density as a weight.

    Source: arXiv:2403.03206, section 3.1.
    """
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


WEIGHTINGS: dict[str, Weighting] = {
    "none": Weighting(none),
    "min_snr": Weighting(min_snr),
    "soft_min_snr": Weighting(soft_min_snr),
    "debiased": Weighting(debiased),
    "p2": Weighting(p2),
    "sigma_sqrt": Weighting(sigma_sqrt, schedules=("flow",)),
    "cosmap": Weighting(cosmap, schedules=("flow",)),
}
