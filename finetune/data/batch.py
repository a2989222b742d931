"""From draws to tensors: everything a forward pass needs, with all its randomness already drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from finetune.data.cache import LatentCache, TextCache
from finetune.data.dataset import Picture
from finetune.data.sampler import Draw
from finetune.families.base import Conditioning, Latents, SizeConditioning
from finetune.rng import python_rng, rng

Tokenize = Callable[[list[str]], dict[str, Tensor]]
"""Captions -> token ids per text encoder, (B, length)."""


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        latents: of the pictures, (B, C, h, w).
        latent_noise: standard normal draw that picks latents from the autoencoder's Gaussian, (B, C, h, w).
        noise: what the denoiser has to find, (B, C, h, w).
        quantiles: u in (0, 1), one per picture, that the objective turns into noise levels, (B,).
        loss_weight: (B,); 0 for a picture that only fills up a process's share.
        conditioning: of the captions, or None when a trained text encoder encodes them in the step.
        tokens: token ids per trained text encoder, or None.
        sizes: how each picture was cut.
        captions: one per picture.
        file_names: one per picture, for messages.
        images_in_step: pictures in the whole optimizer step over all processes; the loss is a mean over them.
    """

    latents: Latents
    latent_noise: Tensor
    noise: Tensor
    quantiles: Tensor
    loss_weight: Tensor
    conditioning: Conditioning | None
    tokens: dict[str, Tensor] | None
    sizes: SizeConditioning
    captions: tuple[str, ...]
    file_names: tuple[str, ...]
    images_in_step: int

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # keep: only pinned memory is copied while the accelerator computes.
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _move(inner, device) for name, inner in value.items()}
    if isinstance(value, Latents | SizeConditioning):
        return replace(value, **{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    return value


class Collator:
    """Turns draws into batches; the same draw gives the same tensors in every process and after every resume."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        latents: LatentCache,
        text: TextCache | Tokenize,
        *,
        seed: int,
        flip: bool,
        caption_dropout: float,
    ) -> None:
        self._pictures = pictures
        self._latents = latents
        self._text = text
        self._seed = seed
        self._flip = flip
        self._caption_dropout = caption_dropout

    def with_text(self, text: TextCache) -> Collator:
        """The same collator, with captions that are encoded already."""
        return Collator(
            self._pictures, self._latents, text,
            seed=self._seed, flip=self._flip, caption_dropout=self._caption_dropout,
        )  # fmt: skip

    def step(self, step: int, micro_batches: Sequence[Sequence[Draw]], rank: int, processes: int) -> list[Batch]:
        """This process's share of one optimizer step.

        Noise levels are stratified over the step: its n pictures get one quantile in each n-th of (0, 1).
        """
        count = sum(len(draws) for draws in micro_batches)
        order = list(range(count))
        python_rng(self._seed, "strata", step).shuffle(order)
        jitter = torch.rand(count, generator=rng(self._seed, "quantiles", step), dtype=torch.float64)
        quantiles = (torch.tensor(order) + jitter) / count
        batches, first = [], 0
        for draws in micro_batches:
            share = _share(len(draws), rank, processes)
            chosen = [draws[i] for i, _ in share]
            real = torch.tensor([weight for _, weight in share])
            picked = quantiles[[first + i for i, _ in share]].float()
            batches.append(self._batch(chosen, real, picked, count))
            first += len(draws)
        return batches

    def captions(self) -> list[str]:
        """Every caption that a draw may choose."""
        texts = [caption for picture in self._pictures for caption in picture.captions]
        return [*texts, ""] if self._caption_dropout > 0 else texts

    def names(self, draws: Sequence[Draw]) -> list[str]:
        """File names of drawn pictures, for messages."""
        return [self._pictures[draw.picture].path.name for draw in draws]

    def latents_of(self, picture: Picture) -> Latents:
        """A picture's latents, not mirrored, shapes (C, h, w)."""
        return self._latents.get(picture, mirrored=False)

    def _batch(self, draws: Sequence[Draw], real: Tensor, quantiles: Tensor, images_in_step: int) -> Batch:
        pictures = [self._pictures[draw.picture] for draw in draws]
        captions = tuple(self._caption(draw) for draw in draws)
        latents = [self._latents.get(p, self._mirrored(draw)) for p, draw in zip(pictures, draws, strict=True)]
        shape = latents[0].mean.shape
        conditioning, tokens = self.describe(captions)
        return Batch(
            latents=Latents(torch.stack([x.mean for x in latents]), torch.stack([x.std for x in latents])),
            latent_noise=torch.stack([self._normal("latent", draw, shape) for draw in draws]),
            noise=torch.stack([self._normal("noise", draw, shape) for draw in draws]),
            quantiles=quantiles,
            loss_weight=torch.tensor([p.loss_weight for p in pictures]) * real,
            conditioning=conditioning,
            tokens=tokens,
            sizes=size_conditioning(pictures),
            captions=captions,
            file_names=tuple(p.path.name for p in pictures),
            images_in_step=images_in_step,
        )

    def describe(self, captions: Sequence[str]) -> tuple[Conditioning | None, dict[str, Tensor] | None]:
        """Cached conditioning, or token ids for text encoders that are themselves trained."""
        if isinstance(self._text, TextCache):
            return stack_conditioning([self._text.get(caption) for caption in captions]), None
        return None, self._text(list(captions))

    def _id(self, draw: Draw) -> tuple[str, int, int]:
        return (self._pictures[draw.picture].key, draw.epoch, draw.repeat)

    def _normal(self, purpose: str, draw: Draw, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=rng(self._seed, purpose, *self._id(draw)))

    def _mirrored(self, draw: Draw) -> bool:
        return self._flip and python_rng(self._seed, "flip", *self._id(draw)).random() < 0.5

    def _caption(self, draw: Draw) -> str:
        choice = python_rng(self._seed, "caption", *self._id(draw))
        if choice.random() < self._caption_dropout:
            return ""
        return choice.choice(self._pictures[draw.picture].captions)


def _share(count: int, rank: int, processes: int) -> list[tuple[int, float]]:
    """Which of `count` pictures process `rank` computes, each with weight 1, or 0 where it only keeps pace."""
    per_process = -(-count // processes)
    places = range(rank * per_process, (rank + 1) * per_process)
    return [(place, 1.0) if place < count else (count - 1, 0.0) for place in places]


def stack_conditioning(items: Sequence[Conditioning]) -> Conditioning:
    """One conditioning per caption, without batch dimension, into one batch."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def size_conditioning(pictures: Sequence[Picture]) -> SizeConditioning:
    """How each picture was cut, (B, 2) each, pixels, (height, width)."""
    return SizeConditioning(
        original_size=torch.tensor([p.size for p in pictures]),
        crop_top_left=torch.tensor([p.placement.crop_top_left for p in pictures]),
        target_size=torch.tensor([p.placement.bucket for p in pictures]),
    )
