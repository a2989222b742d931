"""What noise a picture is drowned in, when plain white noise is not wanted. Everything is drawn from one generator.

Only training sees it: validation and sampling use white noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class NoiseShape:
    """How noise differs from white noise; all zero is white.

    Attributes:
        offset: strength of one constant per channel, in standard deviations of the noise.
        pyramid: share that each coarser level has of the one before, in [0, 1).
        perturbation: strength of noise that the input gets and the target does not.
    """

    offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0


WHITE = NoiseShape()


def draw_noise(shape: Sequence[int], generator: Generator, kind: NoiseShape) -> Tensor:
    """Noise of one picture, shape (C, h, w), float32, on the CPU.

    The white part is drawn first, so that it is the same whatever `kind` adds.
    """
    noise = torch.randn(tuple(shape), generator=generator)
    if kind.offset:
        noise = with_offset(noise, generator, kind.offset)
    if kind.pyramid:
        noise = with_pyramid(noise, generator, kind.pyramid)
    return noise


def with_offset(noise: Tensor, generator: Generator, strength: float) -> Tensor:
    """noise + strength * n_c, one normal draw n_c per channel: lets a picture's mean brightness be learned.

    Without it, schedules that end above pure noise never teach very dark or bright pictures. 0.05 to 0.1 is usual.

    Source: Guttenberg 2023, Diffusion with offset noise, crosslabs.org/blog/diffusion-with-offset-noise.
    """
    return noise + strength * torch.randn((noise.shape[0], 1, 1), generator=generator)


def with_pyramid(noise: Tensor, generator: Generator, discount: float) -> Tensor:
    """noise + sum over levels i of discount^i * up(n_i), divided by its standard deviation.

    n_i is white noise on a grid 2^i times coarser, down to one cell, and up is bilinear. discount 0.3 is usual.

    Source: Whitaker 2023, Multi-resolution noise for diffusion model training, wandb.ai/johnowhitaker/multires_noise;
        his factor between levels is drawn, ours is 2.
    """
    height, width = noise.shape[-2:]
    level = 1
    total = noise.clone()
    while max(height >> level, width >> level) >= 1:
        grid = (noise.shape[0], max(1, height >> level), max(1, width >> level))
        coarse = torch.randn(grid, generator=generator)
        total += discount**level * interpolate(coarse[None], size=(height, width), mode="bilinear")[0]
        level += 1
    return total / total.std()


def perturbed(noise: Tensor, generator: Generator, strength: float) -> Tensor:
    """noise + strength * n: what the picture is noised with, while `noise` stays what is to be found.

    The model learns on inputs that are off by a little, as its own are in sampling. 0.1 is usual.

    Source: Ning et al. 2023, Input perturbation reduces exposure bias, arXiv:2301.11706, equation 7.
    """
    return noise + strength * torch.randn(noise.shape, generator=generator)
