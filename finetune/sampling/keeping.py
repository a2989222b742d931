"""What a mask keeps: after every step the given picture, as noisy as that step left the rest, is laid over it again.

diffusers' inpainting pipelines do the same for denoisers that know no masks. Done from outside it serves every
pipeline, so that a mask goes with a ControlNet and with an autoencoder of any number of channels.
Source: Avrahami et al. 2022, Blended Latent Diffusion, arXiv:2206.02779, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.families.base import ModelFamily
from finetune.families.reading import pack


@dataclass(frozen=True)
class Keeping:
    """The given picture and what may be repainted of it, all in the pipeline's own shape of latents.

    Attributes:
        picture: scaled latents of the picture, one per drawn one.
        noise: standard normal, what the pipeline itself starts from; same shape.
        repainted: 1 where it is repainted, 0 where it is kept; same shape but for a batch of one.
    """

    picture: Tensor
    noise: Tensor
    repainted: Tensor

    def over(self, latents: Tensor, scheduler: Any, step: int, timestep: Any) -> Tensor:
        """The latents after step number `step`, which was at `timestep`, with the kept part as it should be then."""
        kept = self.picture.to(latents)
        following = _place(scheduler, step, timestep) + 1
        if following < len(scheduler.timesteps):
            add = getattr(scheduler, "scale_noise", None)
            noise, time = self.noise.to(latents), scheduler.timesteps[following : following + 1]
            kept = add(kept, time, noise) if add is not None else scheduler.add_noise(kept, noise, time)
        repainted = self.repainted.to(latents)
        return (1 - repainted) * kept + repainted * latents


def keeping(
    family: ModelFamily, picture: Tensor, mask: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Keeping:
    """What is kept of one picture while a batch is drawn.

    Args:
        picture: scaled latents, (1, C, h, w).
        mask: (1, 1, H, W) in pixels, from 0 (keep) to 1 (repaint).
        generators: those of the batch, not yet used; they stay so.
        dtype: number format in which the pipeline draws its noise.
    """
    shape = picture.shape
    noise = torch.cat([torch.randn(shape, generator=generator.clone_state(), dtype=dtype) for generator in generators])
    small = torch.nn.functional.interpolate((mask >= 0.5).float(), size=shape[-2:]).expand(shape)
    side = family.packing
    parts = (picture.expand(len(generators), -1, -1, -1), noise, small)
    return Keeping(*(part if side == 1 else pack(part, side) for part in parts))


def _place(scheduler: Any, step: int, timestep: Any) -> int:
    """Where a step stands among all timesteps of the schedule, of which a pipeline may leave out the first."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin) + step
    times = scheduler.timesteps
    return step if times[step] == timestep else int((times == timestep).nonzero()[0])
