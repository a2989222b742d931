"""Noise that is not white: of the published kinds, keyed, and the same white part underneath."""

from __future__ import annotations

import pytest
import torch

from finetune.objectives import WHITE, NoiseShape, draw_noise, perturbed
from finetune.rng import rng

SHAPE = (4, 32, 24)


def drawn(kind: NoiseShape, count: int = 400) -> torch.Tensor:
    """Many draws, (count, C, h, w)."""
    return torch.stack([draw_noise(SHAPE, rng(0, "noise", i), kind) for i in range(count)])


def test_white_noise_is_the_plain_draw() -> None:
    """A run that asks for nothing gets the noise it always got."""
    assert torch.equal(draw_noise(SHAPE, rng(1, "a"), WHITE), torch.randn(SHAPE, generator=rng(1, "a")))


@pytest.mark.parametrize("kind", [NoiseShape(offset=0.1), NoiseShape(pyramid=0.3)])
def test_a_draw_depends_on_its_key_only(kind: NoiseShape) -> None:
    """Resumes and processes see the same noise."""
    assert torch.equal(draw_noise(SHAPE, rng(1, "a"), kind), draw_noise(SHAPE, rng(1, "a"), kind))
    assert not torch.equal(draw_noise(SHAPE, rng(1, "a"), kind), draw_noise(SHAPE, rng(1, "b"), kind))


def test_offset_adds_one_constant_per_channel() -> None:
    """The mean of a channel varies by the offset; what is left within it is white."""
    white, offset = drawn(WHITE), drawn(NoiseShape(offset=0.5))
    added = offset - white
    assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
    assert added[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


def test_pyramid_keeps_the_size_and_adds_low_frequencies() -> None:
    """Standard deviation 1 as the schedule assumes; the mean of a channel varies more than in white noise."""
    white, pyramid = drawn(WHITE), drawn(NoiseShape(pyramid=0.5))
    assert pyramid.flatten(1).std(1).sub(1).abs().max() < 1e-5
    assert pyramid.mean((2, 3)).std() > 2 * white.mean((2, 3)).std()


def test_perturbation_leaves_the_target_alone() -> None:
    """The input's noise has variance 1 + gamma^2; what is to be found stays white."""
    noise = draw_noise((4, 64, 64), rng(1, "a"), WHITE)
    noisy = perturbed(noise, rng(1, "p"), 0.5)
    assert (noisy - noise).std().item() == pytest.approx(0.5, rel=0.02)
