"""Densities are inverse CDFs: monotone, inside [0, 1], and of the published distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from finetune.objectives.timesteps import DENSITIES, MODE_SCALE_RANGE, DensityParameters

QUANTILES = torch.linspace(0.01, 0.99, 99)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("edge", [False, True])
def test_rises_from_clean_to_noise(name: str, edge: bool) -> None:
    """Validation reads u as "how noisy"; a fold or a value outside [0, 1] would leave the table."""
    parameters = DensityParameters(0.7, 0.4, MODE_SCALE_RANGE[0]) if edge else DensityParameters()
    ends = torch.tensor([1e-8, 1 - 2**-24])
    u = torch.cat([torch.linspace(0, 1, 10_001), ends]).sort().values
    s = DENSITIES[name](u, parameters)
    assert torch.isfinite(s).all() and s.min() >= 0 and s.max() <= 1
    assert (s.diff() >= -1e-6).all()


@pytest.mark.parametrize(
    ("name", "mean", "std", "scale"),
    [
        ("uniform", 0.0, 1.0, 0.0),
        ("logit_normal", 0.0, 1.0, 0.0),
        ("logit_normal", 0.5, 0.6, 0.0),
        ("mode", 0.0, 1.0, 1.29),
        ("mode", 0.0, 1.0, -0.8),
    ],
)
def test_distribution_equals_diffusers(name: str, mean: float, std: float, scale: float) -> None:
    """A million of diffusers' draws have our quantiles, within the error of so many draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling(name, 1_000_000, mean, std, scale, generator=generator)
    ours = DENSITIES[name](QUANTILES, DensityParameters(mean, std, scale))
    torch.testing.assert_close(ours, torch.quantile(drawn, QUANTILES), rtol=0, atol=0.003)


def test_cosmap_has_the_published_density() -> None:
    """diffusers has no cosmap draw; its density must be the derivative of the inverse of our map."""
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64, requires_grad=True)
    s = DENSITIES["cosmap"](u, DensityParameters())
    (slope,) = torch.autograd.grad(s.sum(), u)
    torch.testing.assert_close(1 / slope, 2 / (math.pi * (1 - 2 * s + 2 * s**2)))
    torch.testing.assert_close(s, 1 - 1 / (torch.tan(math.pi / 2 * u) + 1))


@pytest.mark.parametrize("scale", [1.29, -0.8])
def test_mode_is_the_papers_map_read_backwards(scale: float) -> None:
    """f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u) falls; at 1 - u it is the same density and rises."""
    u = QUANTILES.double()
    paper = 1 - (1 - u) - scale * (torch.cos(math.pi / 2 * (1 - u)) ** 2 - 1 + (1 - u))
    torch.testing.assert_close(DENSITIES["mode"](u, DensityParameters(scale=scale)), paper)


def test_positive_mean_favours_noise() -> None:
    """The paper's sign, stated because diffusers' scripts end up with the other one."""
    assert DENSITIES["logit_normal"](torch.tensor([0.5]), DensityParameters(mean=1.0)).item() > 0.7


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.5, 0.5), (1.0, 1.0), (2.0, 5.0), (3.0, 1.5)])
def test_beta_has_its_moments_and_its_published_quantiles(alpha: float, beta: float) -> None:
    """Mean a / (a + b), variance a b / ((a + b)^2 (a + b + 1)), and draws of numpy's own beta."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    s = DENSITIES["beta"](u, DensityParameters(alpha=alpha, beta=beta))
    total = alpha + beta
    assert s.mean().item() == pytest.approx(alpha / total, abs=1e-4)
    assert s.var().item() == pytest.approx(alpha * beta / (total**2 * (total + 1)), abs=1e-4)
    drawn = torch.from_numpy(np.random.default_rng(0).beta(alpha, beta, 400_000))
    ours = DENSITIES["beta"](QUANTILES.double(), DensityParameters(alpha=alpha, beta=beta))
    torch.testing.assert_close(ours, torch.quantile(drawn, QUANTILES.double()), rtol=0, atol=0.005)
