"""What the denoiser predicts about x_t = alpha * x_0 + sigma * noise, and how to read x_0 from it.

alpha and sigma arrive with shapes that broadcast against the latents, usually (B, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import Kind


@dataclass(frozen=True)
class Prediction:
    """One thing a denoiser may be trained to predict.

    Attributes:
        target: (x_0, noise, alpha, sigma) -> what a perfect denoiser answers.
        to_x0: (prediction, x_t, alpha, sigma) -> the clean latents it implies.
        x0_gain: (alpha, sigma) -> squared error in x_0 per squared error of the prediction.
        schedule: the kind of schedule whose algebra the formulas need.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    to_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x0_gain: Callable[[Tensor, Tensor], Tensor]
    schedule: Kind


PREDICTIONS: dict[str, Prediction] = {
    # The noise itself. Ho et al. 2020, arXiv:2006.11239. x_0 = (x_t - sigma * prediction) / alpha.
    "epsilon": Prediction(
        target=lambda x0, noise, alpha, sigma: noise,
        to_x0=lambda prediction, x_t, alpha, sigma: (x_t - sigma * prediction) / alpha,
        x0_gain=lambda alpha, sigma: (sigma / alpha) ** 2,
        schedule="ddpm",
    ),
    # v = alpha * noise - sigma * x_0. Salimans and Ho 2022, arXiv:2202.00512. x_0 = alpha * x_t - sigma *
    # prediction.
    "v_prediction": Prediction(
        target=lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
        to_x0=lambda prediction, x_t, alpha, sigma: alpha * x_t - sigma * prediction,
        x0_gain=lambda alpha, sigma: sigma**2,
        schedule="ddpm",
    ),
    # The clean latents themselves.
    "sample": Prediction(
        target=lambda x0, noise, alpha, sigma: x0,
        to_x0=lambda prediction, x_t, alpha, sigma: prediction,
        x0_gain=lambda alpha, sigma: torch.ones_like(alpha),
        schedule="ddpm",
    ),
    # The velocity noise - x_0 of the straight line. Liu et al. 2022, arXiv:2209.03003. x_0 = x_t - sigma *
    # prediction.
    "flow": Prediction(
        target=lambda x0, noise, alpha, sigma: noise - x0,
        to_x0=lambda prediction, x_t, alpha, sigma: x_t - sigma * prediction,
        x0_gain=lambda alpha, sigma: sigma**2,
        schedule="flow",
    ),
}
"""Predictions under diffusers' names, and "flow"."""
