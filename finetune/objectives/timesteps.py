"""Which noise levels are trained how often: densities over the noise fraction s, as inverse CDFs.

Each function maps quantiles u of shape (B,), in (0, 1), to s of the same shape, in [0, 1]; 0 is clean, 1 is
noise, and s never falls as u rises. Uniform u give s with the named density, and evenly spread u cover it
evenly.

diffusers' training scripts use their draw as an index into a *descending* list of timesteps, so there a
positive `logit_mean` favours clean pictures. Here, as in the paper, it favours noise. At the default mean 0
the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODE_SCALE_RANGE = (-1.0, 2 / (math.pi - 2))
"""Scales for which the mode density's inverse CDF never falls (arXiv:2403.03206, section 3.1)."""


@dataclass(frozen=True)
class DensityParameters:
    """Shape of a density; each one reads what it needs.

    Attributes:
        mean: logit_normal: centre in logit units; above 0 favours noise.
        std: logit_normal: width in logit units; positive.
        scale: mode: how strongly the middle is favoured (negative: the ends), within `MODE_SCALE_RANGE`.
    """

    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29


def uniform(u: Tensor, parameters: DensityParameters) -> Tensor:
    """s = u."""
    return u


def logit_normal(u: Tensor, parameters: DensityParameters) -> Tensor:
    """s = sigmoid(mean + std * Phi^-1(u)), with Phi the normal CDF. Source: arXiv:2403.03206, section 3.1."""
    return torch.sigmoid(parameters.mean + parameters.std * torch.special.ndtri(u))


def mode(u: Tensor, parameters: DensityParameters) -> Tensor:
    """s = u - scale * (sin^2(pi u / 2) - u).

    Source: arXiv:2403.03206, section 3.1, read at 1 - u so that it rises.
    """
    return (u - parameters.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)).clamp(0, 1)


def cosmap(u: Tensor, parameters: DensityParameters) -> Tensor:
    """s = 1 - 1 / (tan(pi u / 2) + 1), of density 2 / (pi (1 - 2 s + 2 s^2)).

    Source: arXiv:2403.03206, section 3.1.
    """
    # The same as sin / (sin + cos), which does not overflow at u = 1.
    sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u).clamp(min=0)
    return sine / (sine + cosine)


DENSITIES: dict[str, Callable[[Tensor, DensityParameters], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
}
