"""What is encoded once: pictures as latent mean and deviation, masks at latent size, captions as conditioning.

An entry's key is a digest of everything that decides its value (file bytes, decoder, cut, colours, side, encoder
weights; for text what the tokenizer made of it), so an edited picture or another autoencoder is a new entry and never a
stale hit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.images import BLACK
from data_tools.shelves import NamedShelf, Shelf
from finetune.data.dataset import Colour
from finetune.data.fill import Progress, Recipe, Say, fill
from finetune.data.pixels import VERSION as PIXELS
from finetune.data.pixels import mask_values, pixel_values
from finetune.data.store import Store, Tensors
from finetune.data.views import View
from finetune.errors import DataError, NumericError
from finetune.families.base import Conditioning, Latents

VERSION = 2
"""Part of every key; counts up when the same inputs would give other values."""
TOKENIZED_AT_ONCE = 1024
KINDS = ("latents", "masks", "holes", "text")
"""The folders in a cache."""

Encode = Callable[[Tensor], Latents]
"""Pixels (B, 3, H, W), uint8 -> latents."""
Tokenize = Callable[[list[str]], dict[str, Tensor]]
"""Captions -> token ids per text encoder, (B, length)."""
Describe = Callable[[dict[str, Tensor]], Conditioning]
"""Token ids -> conditioning, batch first."""


@dataclass(frozen=True)
class Filling:
    """How a cache is filled: how much at once, and whom to tell."""

    batch_size: int
    progress: Progress | None = None
    say: Say | None = None


class LatentCache:
    """Latents of views of pictures."""

    def __init__(self, folder: Path, vae_digest: str, background: Colour) -> None:
        self.store = Store(folder / "latents")
        self._vae_digest = vae_digest
        self._background = background

    def prepare(self, views: Sequence[View], encode: Encode, filling: Filling) -> int:
        """Encode what is not there yet; how many views that were.

        Raises:
            NumericError: naming the picture whose latents are not finite.
        """

        def make(batch: Sequence[View], pixels: Sequence[Tensor]) -> list[Tensors]:
            latents = encode(torch.stack(list(pixels)))
            return [_finite(view, latents.mean[i].cpu(), latents.std[i].cpu()) for i, view in enumerate(batch)]

        load = partial(pixel_values, background=self._background)
        recipe = Recipe("pictures", self._key, lambda view: view.placement.bucket, load, make)
        return fill(self.store, views, recipe, filling.batch_size, progress=filling.progress, say=filling.say)

    def get(self, view: View) -> Latents:
        """The latents of one view, shapes (C, h, w), fp32."""
        tensors = self.store.get(self._key(view))
        return Latents(tensors["mean"].float(), tensors["std"].float())

    def _key(self, view: View) -> str:
        return digest_of([view.picture.sha256, *cut_of(view), view.jitter, self._background, self._vae_digest])


class MaskCache:
    """Masks of views at latent size."""

    def __init__(self, folder: Path, stride: int) -> None:
        """`stride` is how many pixels a latent stands for along one side."""
        self.store = Store(folder / "masks")
        self._stride = stride

    def prepare(self, views: Sequence[View], filling: Filling, *, may_be_empty: bool = False) -> int:
        """Decode and cut what is not there yet; how many that were.

        Raises:
            DataError: listing every picture in which nothing would count, unless they `may_be_empty`.
        """
        places: Iterator[Any] = (place for place, view in enumerate(views) if view.picture.mask is not None)
        masked: Shelf[View] = Shelf(places, unpack=views.__getitem__)
        recipe: Recipe[View, Tensor] = Recipe(
            "masks", self._key, lambda view: view.placement.bucket, partial(mask_values, stride=self._stride),
            lambda batch, masks: [{"mask": mask} for mask in masks],
        )  # fmt: skip
        made = fill(self.store, masked, recipe, filling.batch_size, progress=filling.progress, say=filling.say)
        empty = [] if may_be_empty else [view.picture for view in masked if not self.get(view).any()]
        if empty:
            raise DataError(
                "Some masks leave nothing to learn from:",
                [
                    f"{picture.path.name}: its mask is black everywhere in the part that is trained on; mend it, "
                    "remove the picture, or set data.unmasked_weight above 0"
                    for picture in dict.fromkeys(empty)
                ],
            )
        return made

    def get(self, view: View) -> Tensor:
        """How much each latent counts, (1, h, w) in [0, 1]; 1 everywhere for a picture without a mask."""
        if view.picture.mask is None:
            height, width = view.placement.bucket
            return torch.ones(1, height // self._stride, width // self._stride)
        return self.store.get(self._key(view))["mask"]

    def _key(self, view: View) -> str:
        mask = view.picture.mask
        assert mask is not None, "views without a mask have no entry"
        return digest_of([mask.sha256, mask.is_alpha, BLACK, *cut_of(view), self._stride])


@dataclass
class TextCache:
    """The conditioning of captions, for frozen text encoders."""

    folder: Path
    text_digest: str
    tokenize: Tokenize
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "text")
        self._keys: NamedShelf[str] = NamedShelf()

    def prepare(self, captions: Iterable[str], describe: Describe, filling: Filling) -> int:
        """Encode the captions that are not there yet; how many that were."""
        unique: Shelf[str] = Shelf()
        left = iter(captions)
        while part := list(islice(left, TOKENIZED_AT_ONCE)):
            new = [caption for caption, key in self._keys.gather(dict.fromkeys(part)) if key is None]
            tokens = self.tokenize(new) if new else {}
            for i, caption in enumerate(new):
                unique.append(caption)
                self._keys[caption] = digest_of(
                    [self.text_digest, {name: ids[i].tolist() for name, ids in tokens.items()}]
                )

        def make(batch: Sequence[str], _: Sequence[str]) -> list[Tensors]:
            conditioning = describe(self.tokenize(list(batch)))
            return [_described(caption, conditioning, i) for i, caption in enumerate(batch)]

        recipe: Recipe[str, str] = Recipe("captions", self._keys.__getitem__, lambda caption: "", str, make)
        return fill(self.store, unique, recipe, filling.batch_size, progress=filling.progress, say=filling.say)

    def get(self, caption: str) -> Conditioning:
        """The conditioning of one prepared caption, without a batch dimension; floating point as fp32."""
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in self.store.get(self._keys[caption]).items()
        }


def digest_of(decisive: list[Any]) -> str:
    """The key of an entry, 40 hex digits, from everything that decides its value."""
    return hashlib.sha256(json.dumps([VERSION, *decisive], sort_keys=True).encode()).hexdigest()[:40]


def cut_of(view: View) -> list[Any]:
    """What decides where a view is cut and which side it shows."""
    place = view.placement
    return [PIXELS, place.bucket, place.resize, place.crop_top_left, view.mirrored]


def _finite(view: View, mean: Tensor, std: Tensor) -> Tensors:
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise NumericError(
            f"The autoencoder gives values that are not finite for {view.picture.path.name}; "
            "open the picture: if it looks right, the autoencoder is broken or runs in too small a number format."
        )
    return {"mean": mean, "std": std}


def _described(caption: str, conditioning: Conditioning, place: int) -> Tensors:
    tensors = {name: value[place].cpu() for name, value in conditioning.items()}
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise NumericError(f"A text encoder gives values that are not finite for the caption {caption!r}.")
    return tensors
