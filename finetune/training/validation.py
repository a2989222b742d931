"""A loss that can be compared: fixed pictures, fixed noise, fixed noise levels, as a ratio to the base model.

The training loss of a diffusion model is mostly the luck of the drawn noise level. Here every validation asks
the very same questions, and the answer is divided by the base model's own: 1.00 has learned nothing, below 1
is better, and a rise after a fall on held-out pictures is overfitting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters import AdapterSet
from finetune.data.batch import Batch, Collator, size_conditioning
from finetune.data.dataset import Picture
from finetune.data.views import plain
from finetune.families.base import Latents
from finetune.objectives import Objective
from finetune.rng import rng
from finetune.training.step import batch_losses

BANDS = ("little noise", "middle", "much noise")
"""Thirds of the noise levels, in the order of `Ratio.bands`."""


@dataclass(frozen=True)
class Ratio:
    """Validation loss over the base model's.

    Attributes:
        value: mean loss / mean base loss.
        error: its standard error over pictures; 0 for one picture.
        bands: the ratio per third of the noise levels, from little noise to much.
        loss: the mean loss itself.
    """

    value: float
    error: float
    bands: tuple[float, ...]
    loss: float


class Validator:
    """Asks fixed questions of the model and of the base underneath it."""

    def __init__(
        self, pictures: Sequence[Picture], collator: Collator, objective: Objective, *, quantiles: int, seed: int
    ) -> None:
        """Prepare `quantiles` questions per picture; the questions depend on the seed and the pictures only.
        """
        self._objective = objective
        self._batches = [_questions(picture, collator, quantiles, seed) for picture in pictures]
        self._base: Tensor | None = None

    def measure(self, model: nn.Module, adapters: AdapterSet, accelerator: Accelerator) -> Ratio:
        """The ratio of the model as it is now to its base; the first call also asks the base."""
        if self._base is None:
            with adapters.disabled():
                self._base = self._losses(model, accelerator)
        return compare(self._losses(model, accelerator), self._base)

    def _losses(self, model: nn.Module, accelerator: Accelerator) -> Tensor:
        """Losses of shape (pictures, quantiles), fp64, on the CPU."""
        training = model.training
        model.eval()
        with torch.no_grad():
            rows = [
                batch_losses(model, self._objective, batch.to(accelerator.device), accelerator)
                for batch in self._batches
            ]
        model.train(training)
        return torch.stack(rows).cpu().double()


def compare(losses: Tensor, base: Tensor) -> Ratio:
    """The ratio of two tables of losses, (pictures, quantiles) each, with its uncertainty over pictures.

    The error is that of a ratio of means over paired samples (delta method): the deviation of loss - ratio *
    base.
    """
    value = float(losses.mean() / base.mean())
    residual = losses.mean(1) - value * base.mean(1)
    pictures = len(residual)
    error = float(residual.std() / base.mean() / math.sqrt(pictures)) if pictures > 1 else 0.0
    count = min(len(BANDS), losses.shape[1])
    bands = tuple(
        float(part.mean() / below.mean())
        for part, below in zip(losses.tensor_split(count, dim=1), base.tensor_split(count, dim=1), strict=True)
    )
    return Ratio(value=value, error=error, bands=bands, loss=float(losses.mean()))


def _questions(picture: Picture, collator: Collator, quantiles: int, seed: int) -> Batch:
    """One picture at evenly spread noise levels, each with its own fixed noise; its first caption, not mirrored."""
    latents = collator.latents_of(picture)
    shape = (quantiles, *latents.mean.shape)
    caption, mask, beside = collator.caption_of(picture), collator.mask_of(picture), collator.beside_of(picture)
    conditioning, tokens = collator.describe([caption] * quantiles)
    return Batch(
        latents=Latents(latents.mean.expand(shape), latents.std.expand(shape)),
        latent_noise=torch.zeros(1).expand(shape),
        noise=torch.randn(shape, generator=rng(seed, "validation noise", picture.key)),
        quantiles=(torch.arange(quantiles) + 0.5) / quantiles,
        loss_weight=torch.ones(quantiles),
        conditioning=conditioning,
        tokens=tokens,
        sizes=size_conditioning([plain(picture)] * quantiles),
        captions=(caption,) * quantiles,
        file_names=(picture.path.name,) * quantiles,
        images_in_step=quantiles,
        loss_mask=None if mask is None else mask.expand(quantiles, *mask.shape).contiguous(),
        beside=None if beside is None else beside.expand(quantiles, *beside.shape).contiguous(),
    )
