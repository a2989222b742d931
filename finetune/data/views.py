"""The ways in which a picture is shown: cut in the middle or elsewhere, in other colours, mirrored.

With frozen encoders every view is encoded once, so their number is bounded: version 0 is the picture cut in the middle
(or around its focus) in its own colours, and `versions - 1` others are drawn from the picture's content. Each draw of
the training picks one version and a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from data_tools.buckets import Placement, move, slack
from data_tools.shelves import Shelf
from finetune.data.dataset import Picture
from finetune.rng import python_rng

Jitter = tuple[float, float, float]
"""Factors of brightness, contrast and saturation; 1 changes nothing."""


@dataclass(frozen=True)
class Augment:
    """What may differ from draw to draw.

    Attributes:
        flip: mirror every other draw, left to right.
        random_crop: cut the bucket out anywhere in the resized picture, unless it is zoomed to its subject.
        color_jitter: largest change of brightness, contrast and saturation, as a share of 1.
        holes: hide another part of the picture in every version, for inpainting bases; see `data.holes`.
        versions: of each picture, the plain one included, when one of the three above is on.
    """

    flip: bool = False
    random_crop: bool = False
    color_jitter: float = 0.0
    holes: bool = False
    versions: int = 1

    def count(self) -> int:
        """Versions of each picture; 1 where nothing but the side varies."""
        return self.versions if self.random_crop or self.color_jitter > 0 or self.holes else 1


UNCHANGED = Augment()
"""Every draw shows the same."""


@dataclass(frozen=True, slots=True)
class View:
    """One picture shown in one way; `version` counts only where it decides which part is hidden."""

    picture: Picture
    placement: Placement
    mirrored: bool = False
    jitter: Jitter | None = None
    version: int = 0

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the original in pixels, as SDXL is told it; of a zoomed picture that of the part seen."""
        height, width = self.picture.size
        if not self.placement.zoomed:
            return height, width
        (tall, wide), (down, across) = self.placement.bucket, self.placement.resize
        return round(height * tall / down), round(width * wide / across)

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """(top, left) of the cut, pixels of the resized picture, as SDXL is told it: mirrored where the view is.

        A zoomed picture counts as one that was framed like this: nothing is cut off, or the adapter would learn the
        close view for such numbers only, and samples are asked for with (0, 0).
        """
        if self.placement.zoomed:
            return 0, 0
        top, left = self.placement.crop_top_left
        if self.mirrored:
            left = self.placement.resize[1] - left - self.placement.bucket[1]
        return top, left


def plain(picture: Picture) -> View:
    """The picture as it is validated."""
    return View(picture, picture.placement)


def every_view(picture: Picture, augment: Augment) -> list[View]:
    """All views that `draw_view` may pick, the plain one first, each once."""
    if augment.count() == 1 and not augment.flip:
        return [plain(picture)]
    versions = [_version(picture, augment, number) for number in range(augment.count())]
    sides = (False, True) if augment.flip else (False,)
    return list(dict.fromkeys(replace(view, mirrored=side) for view in versions for side in sides))


def views_of(*parts: tuple[Sequence[Picture], Augment]) -> Sequence[View]:
    """Every view of these pictures, made anew each time it is asked for."""

    def view(place: tuple[int, int, int]) -> View:
        part, picture, number = place
        return every_view(parts[part][0][picture], parts[part][1])[number]

    places: Iterator[Any] = (
        (part, place, number)
        for part, (pictures, augment) in enumerate(parts)
        for place, picture in enumerate(pictures)
        for number, _ in enumerate(every_view(picture, augment))
    )
    return Shelf(places, unpack=view)


def draw_view(picture: Picture, augment: Augment, version: Random, side: Random) -> View:
    """One version, on one side."""
    number = version.randrange(augment.count()) if augment.count() > 1 else 0
    return replace(_version(picture, augment, number), mirrored=augment.flip and side.random() < 0.5)


def _version(picture: Picture, augment: Augment, number: int) -> View:
    if number == 0:
        return plain(picture)
    # keep: keyed by content and not by the run's seed, so that runs share what was encoded.
    chance = python_rng(0, "version", picture.sha256, number)
    across, down, *colours = (chance.random() for _ in range(5))
    anywhere = augment.random_crop and not picture.placement.zoomed
    placement = move(picture.placement, slack(across, down)) if anywhere else picture.placement
    brightness, contrast, saturation = (1 + augment.color_jitter * (2 * share - 1) for share in colours)
    jitter = (brightness, contrast, saturation) if augment.color_jitter > 0 else None
    return View(picture, placement, jitter=jitter, version=number if augment.holes else 0)
