"""A loss that can be compared: fixed pictures, fixed noise, fixed noise levels, as a ratio to the base model.

The training loss of a diffusion model is mostly the luck of the drawn noise level. Here every validation asks
the very same questions, and the answer is divided by the base model's own: 1.00 has learned nothing, below 1
is better, and a rise after a fall on held-out pictures is overfitting.

The questions are the run's own: its noise levels, weighting and loss. Runs that ask otherwise cannot be compared by it,
so such runs are asked the plain question as well: the squared error, evenly spread levels, nothing weighted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
from finetune.training.step import answer

BANDS = ("little noise", "middle", "much noise")
"""Thirds of the noise levels, in the order of `Ratio.bands`."""


@dataclass(frozen=True)
class Ratio:
    """Validation loss over the base model's.

    Attributes:
        value: mean loss / mean base loss.
        error: its standard error over pictures; None where fewer than three give no estimate.
        bands: the ratio per third of the noise levels, from little noise to much.
        loss: the mean loss itself.
        plain: the value by the plain question; None where that is the run's own.
    """

    value: float
    error: float | None
    bands: tuple[float, ...]
    loss: float
    plain: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.error is None else f"{self.value:.3f} +- {self.error:.3f}"


class Validator:
    """Asks fixed questions of the model and of the base underneath it."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        collator: Collator,
        objective: Objective,
        *,
        quantiles: int,
        at_once: int,
        seed: int,
    ) -> None:
        """Prepare `quantiles` questions per picture; the questions depend on the seed and the pictures only.

        Args:
            at_once: questions of one pass; with no more than a training batch has, validation needs less memory than
                a step.
        """
        self._objective = objective
        self._plain = objective.plain()
        self._quantiles = quantiles
        self._batches = [
            batch for picture in pictures for batch in _questions(picture, collator, quantiles, at_once, seed)
        ]
        self._base: tuple[Tensor, Tensor | None] | None = None

    def measure(self, model: nn.Module, adapters: AdapterSet, accelerator: Accelerator) -> Ratio:
        """The ratio of the model as it is now to its base; the first call also asks the base."""
        if self._base is None:
            with adapters.disabled():
                self._base = self._losses(model, accelerator)
        (base, plain_base), (losses, plain) = self._base, self._losses(model, accelerator)
        ratio = compare(losses, base)
        if plain is None or plain_base is None:
            return ratio
        return replace(ratio, plain=float(plain.mean() / plain_base.mean()))

    def _losses(self, model: nn.Module, accelerator: Accelerator) -> tuple[Tensor, Tensor | None]:
        """Losses of shape (pictures, quantiles), fp64, on the CPU: of the run's own question and of the plain one."""
        training = model.training
        model.eval()
        own, plain = [], []
        with torch.no_grad():
            for batch in (batch.to(accelerator.device) for batch in self._batches):
                answered = answer(model, self._objective, batch, accelerator)
                own.append(answered.losses(self._objective, batch))
                if self._plain is None:
                    continue
                if not self._objective.asks_plain_levels():
                    answered = answer(model, self._plain, batch, accelerator)
                plain.append(answered.losses(self._plain, batch))
        model.train(training)
        return self._table(own), self._table(plain) if plain else None

    def _table(self, losses: Sequence[Tensor]) -> Tensor:
        return torch.cat(losses).cpu().double().unflatten(0, (-1, self._quantiles))


def compare(losses: Tensor, base: Tensor) -> Ratio:
    """The ratio of two tables of losses, (pictures, quantiles) each, with its uncertainty over pictures.

    The error is that of a ratio of means over paired samples (delta method): the deviation of loss - ratio *
    base.
    """
    value = float(losses.mean() / base.mean())
    residual = losses.mean(1) - value * base.mean(1)
    pictures = len(residual)
    error = float(residual.std() / base.mean() / math.sqrt(pictures)) if pictures > 2 else None
    count = min(len(BANDS), losses.shape[1])
    bands = tuple(
        float(part.mean() / below.mean())
        for part, below in zip(losses.tensor_split(count, dim=1), base.tensor_split(count, dim=1), strict=True)
    )
    return Ratio(value=value, error=error, bands=bands, loss=float(losses.mean()))


def _questions(picture: Picture, collator: Collator, quantiles: int, at_once: int, seed: int) -> Iterator[Batch]:
    """One picture at evenly spread noise levels, each with its own fixed noise; its first caption, not mirrored."""
    latents = collator.latents_of(picture)
    caption, mask, beside = collator.caption_of(picture), collator.mask_of(picture), collator.beside_of(picture)
    noises = torch.randn((quantiles, *latents.mean.shape), generator=rng(seed, "validation noise", picture.key))
    levels = (torch.arange(quantiles) + 0.5) / quantiles
    for noise, level in zip(noises.split(at_once), levels.split(at_once), strict=True):
        count = len(level)
        conditioning, tokens = collator.describe([caption] * count)
        yield Batch(
            latents=Latents(latents.mean.expand_as(noise), latents.std.expand_as(noise)),
            latent_noise=torch.zeros(1).expand_as(noise),
            noise=noise,
            quantiles=level,
            loss_weight=torch.ones(count),
            conditioning=conditioning,
            tokens=tokens,
            sizes=size_conditioning([plain(picture)] * count),
            captions=(caption,) * count,
            file_names=(picture.path.name,) * count,
            images_in_step=count,
            loss_mask=None if mask is None else mask.expand(count, *mask.shape).contiguous(),
            beside=None if beside is None else beside.expand(count, *beside.shape).contiguous(),
        )
