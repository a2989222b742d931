"""What an inpainting base is shown besides the noisy latents: a mask, and the latents of the picture outside of it.

A picture's own mask is its hole: what is white is hidden. Without one a hole is drawn: one to four rectangles, ellipses
and strokes. One version in four hides everything, which keeps the base able to draw from text alone. Holes belong to
the picture's versions (`views`), so that each is encoded once and the autoencoder is not needed in the training.

Sources: Suvorov et al. 2021, LaMa, arXiv:2109.07161, section 3 (large drawn holes); Runway's model card of Stable
Diffusion inpainting (synthetic masks, and in a quarter of the steps everything masked).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from data_tools.images import BLACK
from finetune.data.cache import Filling, cut_of, digest_of
from finetune.data.dataset import Colour
from finetune.data.fill import Recipe, fill
from finetune.data.pixels import mask_pixels, pixel_values, to_values
from finetune.data.store import Store, Tensors
from finetune.data.views import View
from finetune.errors import NumericError
from finetune.families.base import Latents
from finetune.rng import python_rng

WHOLE = 4
"""Every so-manieth version of a picture is hidden whole."""
WHITE = 255

Encode = Callable[[Tensor], Latents]
"""Pixels (B, 3, H, W) in [-1, 1] -> latents."""


class HoleCache:
    """Of every view, the mask and the latents of what it leaves."""

    def __init__(self, folder: Path, vae_digest: str, background: Colour) -> None:
        self.store = Store(folder / "holes")
        self._vae_digest = vae_digest
        self._background = background

    def prepare(self, views: Sequence[View], encode: Encode, filling: Filling) -> int:
        """Encode what is not there yet; how many views that were.

        Raises:
            NumericError: naming the picture whose latents are not finite.
        """

        def make(batch: Sequence[View], loaded: Sequence[tuple[Tensor, Tensor]]) -> list[Tensors]:
            pixels, holes = (torch.stack(list(part)) for part in zip(*loaded, strict=True))
            kept = encode(to_values(pixels) * (holes == 0)).mean.cpu()
            # keep: nearest, as diffusers' inpainting pipelines bring the mask to the size of the latents.
            masks = functional.interpolate((holes > 0).float(), kept.shape[-2:])
            return [_finite(view, torch.cat([masks[i], kept[i]])) for i, view in enumerate(batch)]

        recipe = Recipe("pictures with holes", self._key, lambda view: view.placement.bucket, self._load, make)
        return fill(self.store, views, recipe, filling.batch_size, progress=filling.progress, say=filling.say)

    def get(self, view: View) -> Tensor:
        """The mask, 1 where the view is hidden, and the latents of the rest behind it; (1 + C, h, w)."""
        return self.store.get(self._key(view))["beside"].float()

    def _load(self, view: View) -> tuple[Tensor, Tensor]:
        return pixel_values(view, self._background), hole_of(view)

    def _key(self, view: View) -> str:
        return digest_of([view.picture.sha256, *cut_of(view), view.jitter, self._background, self._vae_digest,
                          *_kind(view)])  # fmt: skip


def hole_of(view: View) -> Tensor:
    """What is hidden of a view; (1, H, W), uint8: 255 inside, 0 outside."""
    height, width = view.placement.bucket
    kind, *_ = _kind(view)
    if kind == "whole":
        return torch.full((1, height, width), WHITE, dtype=torch.uint8)
    if kind == "own":
        return (mask_pixels(view) >= 128).to(torch.uint8) * WHITE
    # keep: keyed by content and not by the run's seed, so that runs share what was encoded.
    return drawn_hole(height, width, python_rng(0, "hole", view.picture.sha256, view.version))


def drawn_hole(height: int, width: int, chance: Random) -> Tensor:
    """One to four large shapes; (1, height, width), uint8: 255 inside, 0 outside."""
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for _ in range(chance.randint(1, 4)):
        SHAPES[chance.choice(list(SHAPES))](draw, width, height, chance)
    return torch.from_numpy(np.array(canvas))[None]


def _box(width: int, height: int, chance: Random) -> tuple[float, float, float, float]:
    """A fifth to seven tenths of each side, anywhere inside."""
    across, down = width * chance.uniform(0.2, 0.7), height * chance.uniform(0.2, 0.7)
    left, top = chance.uniform(0, width - across), chance.uniform(0, height - down)
    return left, top, left + across, top + down


def _rectangle(draw: ImageDraw.ImageDraw, width: int, height: int, chance: Random) -> None:
    draw.rectangle(_box(width, height, chance), fill=WHITE)


def _ellipse(draw: ImageDraw.ImageDraw, width: int, height: int, chance: Random) -> None:
    draw.ellipse(_box(width, height, chance), fill=WHITE)


def _stroke(draw: ImageDraw.ImageDraw, width: int, height: int, chance: Random) -> None:
    points = [(chance.uniform(0, width), chance.uniform(0, height)) for _ in range(chance.randint(2, 5))]
    thick = max(1, round(min(width, height) * chance.uniform(0.08, 0.25)))
    draw.line(points, fill=WHITE, width=thick, joint="curve")


SHAPES = {"rectangle": _rectangle, "ellipse": _ellipse, "stroke": _stroke}
"""What holes are drawn of."""


def _kind(view: View) -> tuple[str, *tuple[object, ...]]:
    """Which hole a view has, and what decides it."""
    if view.version % WHOLE == WHOLE - 1:
        return ("whole",)
    mask = view.picture.mask
    return ("own", mask.sha256, mask.is_alpha, BLACK) if mask is not None else ("drawn", view.version)


def _finite(view: View, beside: Tensor) -> Tensors:
    if not torch.isfinite(beside).all():
        raise NumericError(
            f"The autoencoder gives values that are not finite for {view.picture.path.name} with a hole in it; it is "
            "broken or runs in too small a number format."
        )
    return {"beside": beside}
