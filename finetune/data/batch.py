"""From draws to tensors: everything a forward pass needs, with all its randomness already drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from finetune.data.cache import LatentCache, MaskCache, TextCache, Tokenize
from finetune.data.captions import PLAIN, VERBATIM, CaptionRules, draw_caption, every_caption, plain_caption
from finetune.data.dataset import Picture
from finetune.data.holes import HoleCache
from finetune.data.sampler import Draw
from finetune.data.views import UNCHANGED, Augment, View, draw_view, plain, views_of
from finetune.families.base import Conditioning, Latents, SizeConditioning
from finetune.objectives import WHITE, NoiseShape, draw_noise, perturbed
from finetune.rng import python_rng, rng


@dataclass(frozen=True)
class Variation:
    """What differs from draw to draw.

    Attributes:
        augment: how pictures are cut, coloured and mirrored.
        rules: how subject captions are made; class captions stay as they are.
        caption_variants: texts that each caption may become while the text encoders are frozen and all are encoded
            beforehand; with text encoders that are trained there is no bound.
        caption_dropout: share of draws that see an empty caption.
        unmasked_weight: what counts of a place that a mask leaves out.
        noise: how the noise differs from white noise.
    """

    augment: Augment = UNCHANGED
    rules: CaptionRules = PLAIN
    caption_variants: int = 1
    caption_dropout: float = 0.0
    unmasked_weight: float = 0.0
    noise: NoiseShape = WHITE


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
        loss_mask: how much each place counts, (B, 1, h, w) in [0, 1]; None: all places alike.
        input_noise: what the picture is noised with when that is not `noise`, the noise to find: input perturbation.
        beside: what an inpainting denoiser is shown besides, (B, 1 + C, h, w); None for others. See `data.holes`.
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
    loss_mask: Tensor | None = None
    input_noise: Tensor | None = None
    beside: Tensor | None = None

    def shown(self, noisy_latents: Tensor) -> Tensor:
        """What the denoiser is shown: the noisy latents, (B, C, h, w), and what stands beside them."""
        return noisy_latents if self.beside is None else torch.cat([noisy_latents, self.beside], dim=1)

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
        self, pictures: Sequence[Picture], latents: LatentCache, text: TextCache | Tokenize, variation: Variation,
        *, seed: int, masks: MaskCache | None = None, holes: HoleCache | None = None,
    ) -> None:  # fmt: skip
        """Collate `pictures`; with `masks` every batch carries one, with `holes` what an inpainting denoiser is shown.
        """
        self._pictures = pictures
        self._latents = latents
        self._masks = masks
        self._holes = holes
        self._text = text
        self._variation = variation
        self._seed = seed

    def with_text(self, text: TextCache) -> Collator:
        """The same collator, with captions that are encoded already."""
        return Collator(
            self._pictures, self._latents, text, self._variation, seed=self._seed, masks=self._masks,
            holes=self._holes,
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

    def captions(self) -> Iterator[str]:
        """Every text that a draw or a validation may choose, some of them more than once."""
        for picture in self._pictures:
            yield from every_caption(picture.captions, self._rules(picture), self._variation.caption_variants)
            yield self.caption_of(picture)
        if self._variation.caption_dropout > 0:
            yield ""

    def views(self, held: Sequence[Picture] = ()) -> Sequence[View]:
        """Every view that a draw may choose, and the plain ones of pictures that are only validated on."""
        return views_of((self._pictures, self._variation.augment), (held, UNCHANGED))

    def names(self, draws: Sequence[Draw]) -> list[str]:
        """File names of drawn pictures, for messages."""
        return [self._pictures[draw.picture].path.name for draw in draws]

    def latents_of(self, picture: Picture) -> Latents:
        """A picture's latents in its plain view, shapes (C, h, w)."""
        return self._latents.get(plain(picture))

    def mask_of(self, picture: Picture) -> Tensor | None:
        """How much each latent of the plain view counts, (1, h, w); None when no picture of the run has a mask."""
        return self._mask(plain(picture))

    def beside_of(self, picture: Picture) -> Tensor | None:
        """What an inpainting denoiser is shown of the plain view, (1 + C, h, w); None for others."""
        return None if self._holes is None else self._holes.get(plain(picture))

    def caption_of(self, picture: Picture) -> str:
        """The text that a picture is validated with."""
        return plain_caption(picture.captions, self._rules(picture))

    def _batch(self, draws: Sequence[Draw], real: Tensor, quantiles: Tensor, images_in_step: int) -> Batch:
        pictures = [self._pictures[draw.picture] for draw in draws]
        captions = tuple(self._caption(draw) for draw in draws)
        views = [self._view(draw) for draw in draws]
        latents = [self._latents.get(view) for view in views]
        masks = [mask for view in views if (mask := self._mask(view)) is not None]
        shape = latents[0].mean.shape
        noises = [draw_noise(shape, self._rng("noise", draw), self._variation.noise) for draw in draws]
        conditioning, tokens = self.describe(captions)
        return Batch(
            latents=Latents(torch.stack([x.mean for x in latents]), torch.stack([x.std for x in latents])),
            latent_noise=torch.stack([self._normal("latent", draw, shape) for draw in draws]),
            noise=torch.stack(noises),
            quantiles=quantiles,
            loss_weight=torch.tensor([p.loss_weight for p in pictures]) * real,
            conditioning=conditioning,
            tokens=tokens,
            sizes=size_conditioning(views),
            captions=captions,
            file_names=tuple(p.path.name for p in pictures),
            images_in_step=images_in_step,
            loss_mask=torch.stack(masks) if masks else None,
            input_noise=self._input_noise(noises, draws),
            beside=None if self._holes is None else torch.stack([self._holes.get(view) for view in views]),
        )

    def describe(self, captions: Sequence[str]) -> tuple[Conditioning | None, dict[str, Tensor] | None]:
        """Cached conditioning, or token ids for text encoders that are themselves trained."""
        if isinstance(self._text, TextCache):
            return stack_conditioning([self._text.get(caption) for caption in captions]), None
        return None, self._text(list(captions))

    def _id(self, draw: Draw) -> tuple[str, int, int]:
        return (self._pictures[draw.picture].key, draw.epoch, draw.repeat)

    def _rng(self, purpose: str, draw: Draw) -> torch.Generator:
        return rng(self._seed, purpose, *self._id(draw))

    def _normal(self, purpose: str, draw: Draw, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._rng(purpose, draw))

    def _input_noise(self, noises: Sequence[Tensor], draws: Sequence[Draw]) -> Tensor | None:
        strength = self._variation.noise.perturbation
        if not strength:
            return None
        pairs = zip(noises, draws, strict=True)
        return torch.stack([perturbed(noise, self._rng("perturbation", draw), strength) for noise, draw in pairs])

    def _view(self, draw: Draw) -> View:
        version = python_rng(self._seed, "version", *self._id(draw))
        side = python_rng(self._seed, "flip", *self._id(draw))
        return draw_view(self._pictures[draw.picture], self._variation.augment, version, side)

    def _mask(self, view: View) -> Tensor | None:
        if self._masks is None:
            return None
        least = self._variation.unmasked_weight
        return least + (1 - least) * self._masks.get(view)

    def _rules(self, picture: Picture) -> CaptionRules:
        return VERBATIM if picture.is_class else self._variation.rules

    def _caption(self, draw: Draw) -> str:
        choice = python_rng(self._seed, "caption", *self._id(draw))
        if choice.random() < self._variation.caption_dropout:
            return ""
        picture = self._pictures[draw.picture]
        bound = self._variation.caption_variants if isinstance(self._text, TextCache) else None
        return draw_caption(picture.captions, self._rules(picture), choice, bound)


def _share(count: int, rank: int, processes: int) -> list[tuple[int, float]]:
    """Which of `count` pictures process `rank` computes, each with weight 1, or 0 where it only keeps pace."""
    per_process = -(-count // processes)
    places = range(rank * per_process, (rank + 1) * per_process)
    return [(place, 1.0) if place < count else (count - 1, 0.0) for place in places]


def stack_conditioning(items: Sequence[Conditioning]) -> Conditioning:
    """One conditioning per caption, without batch dimension, into one batch."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def size_conditioning(views: Sequence[View]) -> SizeConditioning:
    """How each view was cut, (B, 2) each, pixels, (height, width)."""
    return SizeConditioning(
        original_size=torch.tensor([view.original_size for view in views]),
        crop_top_left=torch.tensor([view.crop_top_left for view in views]),
        target_size=torch.tensor([view.placement.bucket for view in views]),
    )
