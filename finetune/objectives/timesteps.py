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
        alpha: beta: weight of the noisy end; at least 0.5.
        beta: beta: weight of the clean end; at least 0.5.
    """

    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    alpha: float = 0.6
    beta: float = 0.6


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


BETA_POINTS = 4096
"""Points of the table that `beta` is read from; its error is below 1e-4."""


def beta(u: Tensor, parameters: DensityParameters) -> Tensor:
    """s = I^-1(u), the inverse of the regularised incomplete beta function with shapes (alpha, beta).

    Both below 1 favour the two ends, both above 1 the middle; alpha > beta favours noise. There is no closed form: with
    s = sin^2(phi) the density is 2 sin^(2 alpha - 1) cos^(2 beta - 1), bounded for shapes of 0.5 and more, and is
    summed up on a grid in phi.

    Source: Lee et al. 2024, Beta sampling is all you need, arXiv:2407.12173; 0.6, 0.6.
    """
    middles = (torch.arange(BETA_POINTS, device=u.device, dtype=torch.float64) + 0.5) * (math.pi / 2 / BETA_POINTS)
    mass = torch.sin(middles) ** (2 * parameters.alpha - 1) * torch.cos(middles) ** (2 * parameters.beta - 1)
    summed = torch.cumsum(mass, 0)
    cdf = summed / summed[-1]
    wanted = u.double()
    above = torch.searchsorted(cdf, wanted).clamp(max=BETA_POINTS - 1)
    upper = cdf[above]
    lower = torch.where(above > 0, cdf[(above - 1).clamp(min=0)], torch.zeros_like(upper))
    inside = ((wanted - lower) / (upper - lower).clamp(min=1e-300)).clamp(0, 1)
    phi = (above + inside) * (math.pi / 2 / BETA_POINTS)
    return (torch.sin(phi) ** 2).to(u.dtype)


def shifted(s: Tensor, shift: float) -> Tensor:
    """shift s / (1 + (shift - 1) s): above 1 pushes every density towards noise, below 1 towards clean pictures.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    return shift * s / (1 + (shift - 1) * s)


def squeezed(s: Tensor, limits: tuple[float, float]) -> Tensor:
    """low + (high - low) s: the whole density on a part of the noise levels, e.g. on the noisy half."""
    low, high = limits
    return low + (high - low) * s


DENSITIES: dict[str, Callable[[Tensor, DensityParameters], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "beta": beta,
}
