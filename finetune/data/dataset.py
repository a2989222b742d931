"""A folder of pictures, decided: which pictures, which captions, how each is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools import buckets, scan
from data_tools.buckets import Placement
from data_tools.errors import grouped
from data_tools.records import ImageRecord
from data_tools.scan import Problem
from finetune.config import has_word
from finetune.data.sampler import Item
from finetune.errors import ConfigError, DataError
from finetune.rng import python_rng

Colour = tuple[int, int, int]
"""Red, green, blue; 0 to 255."""


@dataclass(frozen=True)
class Picture:
    """One training picture with everything about it settled.

    Attributes:
        path: where its file is.
        key: role and file name, e.g. "instance/01.png"; all its randomness hangs on it.
        sha256: of the file's bytes.
        captions: one is chosen per draw.
        placement: bucket, resize and crop.
        size: (height, width) of the upright original, in pixels.
        repeats: appearances per epoch.
        loss_weight: 1, or prior_loss_weight for a class picture.
        is_class: whether it is a class picture.
    """

    path: Path
    key: str
    sha256: str
    captions: tuple[str, ...]
    placement: Placement
    size: tuple[int, int]
    repeats: int
    loss_weight: float
    is_class: bool

    def item(self) -> Item:
        """What the sampler needs of it."""
        return Item(bucket=self.placement.bucket, repeats=self.repeats, is_class=self.is_class)


@dataclass(frozen=True)
class Cut:
    """How pictures become training size.

    Attributes:
        resolution: side of a square picture, in pixels.
        multiple: bucket sides are multiples of it.
        upscale: whether small pictures are enlarged.
        background: put behind transparent pixels.
    """

    resolution: int
    multiple: int
    upscale: bool
    background: Colour


def load_pictures(
    folder: Path,
    cut: Cut,
    *,
    captions: str = "auto",
    template: str | None = None,
    repeats: int = 1,
    loss_weight: float = 1.0,
    is_class: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Picture], list[Problem]]:
    """Scan a folder and settle every picture in it.

    Returns:
        The pictures in the order of their names, and warnings and notes worth showing.

    Raises:
        DataError: listing every picture that cannot be trained on.
    """
    if not folder.is_dir():
        raise DataError(f"data.folder={folder} is no folder; name the folder that holds the pictures.")
    result = scan.scan(folder, captions=captions, template=template, background=cut.background, progress=progress)
    role = "class" if is_class else "instance"
    errors = grouped([p for p in result.problems if p.severity == "error"])
    for record in result.records:
        if record.mask_file is not None:
            errors.append(f"{record.file_name}: has a mask, and training with masks is not possible yet; take it out")
        if record.role == "class" and not is_class:
            errors.append(f"{record.file_name}: is a class picture; put it into a folder for data.prior.folder")
    if errors:
        raise DataError(f"{folder} cannot be trained on yet:", errors)
    if not result.records:
        raise DataError(f"{folder} holds no pictures; JPEG, PNG and WebP files are read, in sub-folders as well.")
    sides = buckets.make_buckets(cut.resolution, cut.multiple)
    placements = buckets.place(result.records, sides, upscale=cut.upscale, multiple=cut.multiple)
    pictures = [
        _settle(folder / record.file_name, record, place, role, repeats=record.repeats * repeats, weight=loss_weight)
        for record, place in zip(result.records, placements, strict=True)
    ]
    return pictures, [p for p in result.problems if p.severity != "error"]


def _settle(
    path: Path, record: ImageRecord, placement: Placement, role: str, *, repeats: int, weight: float
) -> Picture:
    return Picture(
        path=path,
        key=f"{role}/{record.file_name}",
        sha256=record.sha256,
        captions=tuple(record.captions),
        placement=placement,
        size=(record.height, record.width),
        repeats=repeats,
        loss_weight=weight,
        is_class=role == "class",
    )


def split_holdout(pictures: Sequence[Picture], count: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Training pictures and held-out ones; which are held out depends on the seed and the names only.

    Raises:
        ConfigError: if nothing would be left to train on.
    """
    if count >= len(pictures):
        raise ConfigError(
            f"validation.holdout={count} leaves nothing to train on: there are {len(pictures)} subject pictures; "
            "set it to 0 (a probe of the training pictures is used) or add pictures."
        )
    held = set(python_rng(seed, "holdout").sample(sorted(p.key for p in pictures), count))
    return [p for p in pictures if p.key not in held], [p for p in pictures if p.key in held]


def check_trigger(pictures: Sequence[Picture], trigger: str | None) -> None:
    """Every caption must hold the trigger word, or the adapter would not answer to it.

    Raises:
        DataError: listing each caption without it.
    """
    if not trigger:
        return
    missing = [
        f"{p.path.name}: {caption!r} does not hold the trigger {trigger!r}; add it to the caption or drop data.trigger"
        for p in pictures
        for caption in p.captions
        if not has_word(caption, trigger)
    ]
    if missing:
        raise DataError("Some captions would not teach the trigger word:", missing)


def long_captions(pictures: Sequence[Picture], tokenizers: dict[str, Any]) -> list[str]:
    """A line for every caption of which a text encoder would not see the end."""
    lines = []
    for picture in pictures:
        for caption in picture.captions:
            for name, tokenizer in tokenizers.items():
                count, room = len(tokenizer(caption).input_ids), tokenizer.model_max_length
                if count > room:
                    lines.append(
                        f"{picture.path.name}: the caption has {count} tokens, {name} reads {room}; the last "
                        f"{count - room} have no effect"
                    )
    return lines


def bucket_counts(pictures: Sequence[Picture]) -> list[tuple[tuple[int, int], int, float]]:
    """Per bucket: (height, width), how many pictures, and the mean share of a picture that is cropped away."""
    counts = Counter(p.placement.bucket for p in pictures)
    return [
        (bucket, count, sum(p.placement.lost for p in pictures if p.placement.bucket == bucket) / count)
        for bucket, count in sorted(counts.items())
    ]


def fingerprint(pictures: Sequence[Picture]) -> dict[str, list[Any]]:
    """What a resumed run compares: per picture its content, captions, cut, repeats and weight."""
    return {
        p.key: [p.sha256, list(p.captions), list(p.placement.bucket), list(p.placement.crop_top_left), p.repeats,
                p.loss_weight]
        for p in pictures
    }  # fmt: skip


def dataset_changes(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> list[str]:
    """One line per picture that was added, removed or changed since a checkpoint was written."""
    parts = ("the picture", "a caption", "the bucket", "the crop", "the repeats", "the loss weight")
    lines = [f"{key} is gone" for key in sorted(before.keys() - now.keys())]
    lines += [f"{key} is new" for key in sorted(now.keys() - before.keys())]
    for key in sorted(before.keys() & now.keys()):
        changed = [part for part, old, new in zip(parts, before[key], now[key], strict=True) if old != new]
        lines += [f"{key}: {' and '.join(changed)} changed"] if changed else []
    return lines
