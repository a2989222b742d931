"""A folder of pictures, decided: which pictures, which captions and masks, how each is cut."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools import buckets, scan
from data_tools.buckets import Placement
from data_tools.errors import RefusedError, counted, grouped
from data_tools.files import read_regular
from data_tools.fingerprints import sha256
from data_tools.images import MAX_FILE_BYTES
from data_tools.memory import Memory, open_memory
from data_tools.records import ImageRecord
from data_tools.scan import Problem
from data_tools.shelves import NamedShelf, Shelf, packing
from data_tools.verdicts import without_dropped
from finetune.config import has_word
from finetune.data.captions import PLACEHOLDER, CaptionRules, without_trigger
from finetune.data.sampler import Item
from finetune.errors import DataError, first_few

TOLD_AT_ONCE = 256
"""Pictures whose captions are counted at once."""
Colour = tuple[int, int, int]
"""Red, green, blue; 0 to 255."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Where a picture's loss counts.

    Attributes:
        path: of the mask, or of the picture itself.
        sha256: of that file's bytes.
        is_alpha: whether it is the picture's own opacity.
    """

    path: Path
    sha256: str
    is_alpha: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """One training picture with everything about it settled.

    Attributes:
        path: where its file is.
        key: role and file name, e.g. "instance/01.png"; all its randomness hangs on it.
        sha256: of the file's bytes.
        captions: as they were written; one is chosen per draw.
        placement: bucket, resize and crop.
        size: (height, width) of the upright original, in pixels.
        repeats: appearances per epoch.
        loss_weight: its own weight, for a class picture times prior_loss_weight.
        is_class: whether it is a class picture.
        mask: where its loss counts; None: everywhere.
        phash: perceptual hash, 16 hex digits; near copies differ in few bits.
        pixel_sha256: of its decoded pixels.
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
    mask: Mask | None = None
    phash: str = ""
    pixel_sha256: str = ""

    def item(self) -> Item:
        """What the sampler needs of it."""
        return Item(bucket=self.placement.bucket, repeats=self.repeats, is_class=self.is_class)


_PATH = (str, Path)
PICTURE = packing(Picture, path=_PATH, placement=packing(Placement), mask=packing(Mask, path=_PATH))
"""How pictures are kept on a shelf."""


def shelf(pictures: Iterable[Picture] = ()) -> Shelf[Picture]:
    """A list of pictures that lies on the disk; a million of them are 8 MB of memory."""
    return Shelf(pictures, *PICTURE)


@dataclass(frozen=True)
class Cut:
    """How pictures become training size.

    Attributes:
        resolution: side of a square picture, in pixels.
        multiple: bucket sides are multiples of it.
        upscale: whether small pictures are enlarged.
        background: put behind transparent pixels.
        holes: whether parts are hidden as well, for an inpainting base; see `data.holes`.
    """

    resolution: int
    multiple: int
    upscale: bool
    background: Colour
    holes: bool = False


@dataclass(frozen=True)
class Reading:
    """What a folder is read as.

    Attributes:
        captions: where they come from; a name in `data_tools.captioners`.
        template: caption for pictures that have none.
        repeats: appearances per epoch, times each picture's own.
        class_weight: weight of a class picture's loss.
        is_class: whether the whole folder shows the class; else each row's `role` says so.
        mask: "auto" reads mask files where there are any, "alpha" each picture's transparency, "off" none.
    """

    captions: str = "auto"
    template: str | None = None
    repeats: int = 1
    class_weight: float = 1.0
    is_class: bool = False
    mask: str = "auto"


def load_pictures(
    folder: Path, cut: Cut, reading: Reading = Reading(), *, progress: Callable[[int, int], None] | None = None
) -> tuple[Shelf[Picture], list[Problem]]:
    """Scan a folder and settle every picture in it. Pictures that an earlier scan saw are not decoded again.

    Returns:
        The pictures in the order of their names, and warnings and notes worth showing.

    Raises:
        DataError: listing every picture that cannot be trained on.
    """
    memory, slow = _memory(folder, cut.background)
    try:
        result = scan.scan(
            folder, captions=reading.captions, template=reading.template, background=cut.background,
            progress=progress, memory=memory,
        )  # fmt: skip
    finally:
        if memory is not None:
            memory.close()
    errors = grouped([p for p in result.problems if p.severity == "error"])
    if errors:
        raise DataError(f"{folder} cannot be trained on yet:", errors)
    records, left_out = without_dropped(result.records)
    if not records:
        raise DataError(
            f"{folder} holds no pictures to train on; JPEG, PNG and WebP files are read, in sub-folders as well.",
            grouped(left_out),
        )
    sides = buckets.make_buckets(cut.resolution, cut.multiple)
    placements = buckets.place(records, sides, upscale=cut.upscale, multiple=cut.multiple)
    pictures = shelf(
        _settle(folder, record, place, reading) for record, place in zip(records, placements, strict=True)
    )
    found = [problem for problem in result.problems if problem.severity != "error"]
    zoomed = buckets.zoom_notes(records, placements)
    return pictures, [*found, *left_out, *_conversions(records), *zoomed, *slow]


def _conversions(records: Sequence[ImageRecord]) -> list[Problem]:
    """What had to be done to pictures to read them, such as alpha, rotation and frames: once for all that are alike."""
    counts = Counter(note for record in records for note in record.notes)
    return [
        Problem("", f"{counted(count, 'picture')}: {note}", "that is how it was read", "", "note")
        for note, count in sorted(counts.items())
    ]


def _memory(folder: Path, background: Colour) -> tuple[Memory | None, list[Problem]]:
    """What earlier scans saw of the folder; a note where there is no place to remember it."""
    memory, reason = open_memory(folder, background)
    if reason is None:
        return memory, []
    why = "every start decodes every picture again"
    advice = "set FINETUNE_CACHE to a folder that can be written"
    return None, [Problem("", f"what is scanned cannot be remembered: {reason}", why, advice, "note")]


def _settle(folder: Path, record: ImageRecord, placement: Placement, reading: Reading) -> Picture:
    is_class = reading.is_class or record.role == "class"
    # keep: a class row of the subject's folder may have the name of a picture in the class folder.
    role = "class" if reading.is_class else "class row" if is_class else "instance"
    return Picture(
        path=folder / record.file_name,
        key=f"{role}/{record.file_name}",
        sha256=record.sha256,
        captions=tuple(record.captions),
        placement=placement,
        size=(record.height, record.width),
        repeats=record.repeats * (1 if is_class else reading.repeats),
        loss_weight=record.loss_weight * (reading.class_weight if is_class else 1.0),
        is_class=is_class,
        mask=_mask(folder, record, reading.mask),
        phash=record.phash,
        pixel_sha256=record.pixel_sha256,
    )


def _mask(folder: Path, record: ImageRecord, kind: str) -> Mask | None:
    if kind == "alpha":
        return Mask(folder / record.file_name, record.sha256, is_alpha=True)
    if kind == "off" or record.mask_file is None:
        return None
    path = folder / record.mask_file
    try:
        return Mask(path, sha256(read_regular(path, MAX_FILE_BYTES)), is_alpha=False)
    except RefusedError as refusal:
        raise DataError("A mask cannot be read:", [str(refusal.problem(record.mask_file))]) from refusal


def check_trigger(pictures: Iterable[Picture], rules: CaptionRules, variants: int) -> None:
    """Every text a subject caption can become must hold the trigger word, or the adapter would not answer to it.

    Raises:
        DataError: listing each caption without it, and each class caption with it.
    """
    problems = list(_trigger_problems(pictures, rules, variants))
    if problems:
        raise DataError("Some captions would not teach the trigger word:", first_few(problems))


def _trigger_problems(pictures: Iterable[Picture], rules: CaptionRules, variants: int) -> Iterator[str]:
    for picture in pictures:
        name = picture.path.name
        for caption in picture.captions:
            if not rules.trigger:
                if PLACEHOLDER in caption:
                    yield f"{name}: {caption!r} holds {PLACEHOLDER}, and data.trigger is not set; set it to your word"
            elif picture.is_class:
                if PLACEHOLDER in caption or has_word(caption, rules.trigger):
                    yield (f"{name}: {caption!r} is the caption of a class picture and holds the trigger, so the class "
                           "would be taught under the subject's name; take it out")  # fmt: skip
            elif missing := without_trigger([caption], rules, variants):
                yield (f"{name}: {missing[0]!r} does not hold the trigger {rules.trigger!r}; add it to the caption, "
                       f"write {PLACEHOLDER} where it belongs, or drop data.trigger")  # fmt: skip


def long_captions(
    pictures: Iterable[Picture], tokenizers: dict[str, Any], room: dict[str, int]
) -> Iterator[str]:
    """A line for every caption of which a text encoder would not see the end; `room` is how many tokens each reads."""
    left = iter(pictures)
    while part := list(islice(left, TOLD_AT_ONCE)):
        captions = list(dict.fromkeys(caption for picture in part for caption in picture.captions))
        counts = {
            name: dict(zip(captions, map(len, tokenizer(captions, verbose=False).input_ids), strict=True))
            for name, tokenizer in tokenizers.items()
            if captions
        }
        yield from (
            f"{picture.path.name}: the caption has {count[caption]} tokens, {name} reads {room[name]}; the last "
            f"{count[caption] - room[name]} have no effect"
            for picture in part
            for caption in picture.captions
            for name, count in counts.items()
            if count[caption] > room[name]
        )


def bucket_counts(pictures: Iterable[Picture]) -> list[tuple[tuple[int, int], int, float]]:
    """Per bucket: (height, width), how many pictures, and the mean share of a picture that is cropped away."""
    counts: Counter[tuple[int, int]] = Counter()
    lost: defaultdict[tuple[int, int], float] = defaultdict(float)
    for picture in pictures:
        counts[picture.placement.bucket] += 1
        lost[picture.placement.bucket] += picture.placement.lost
    return [(bucket, count, lost[bucket] / count) for bucket, count in sorted(counts.items())]


def fingerprint(pictures: Iterable[Picture], origins: Mapping[str, str] | None = None) -> Mapping[str, list[Any]]:
    """What a resumed run compares: per picture its content, captions, cut, repeats, weight and mask.

    Args:
        origins: what some contents count as: the digest of a file -> the digest of what it was made by.
    """
    origins = origins or {}
    table: NamedShelf[list[Any]] = NamedShelf()
    for p in pictures:
        table[p.key] = [origins.get(p.sha256, p.sha256), list(p.captions), list(p.placement.bucket), _cut(p.placement),
                        p.repeats, p.loss_weight, p.mask.sha256 if p.mask else None]  # fmt: skip
    return table


def _cut(placement: Placement) -> list[int]:
    """What decides what is seen of a picture in its bucket; its size says how large it is unless it is zoomed."""
    return [*placement.crop_top_left, *(placement.resize if placement.zoomed else ())]


def dataset_changes(before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> list[str]:
    """One line per picture that was added, removed or changed since a checkpoint was written."""
    parts = ("the picture", "a caption", "the bucket", "the crop", "the repeats", "the loss weight", "the mask")
    lines = [f"{key} is gone" for key in sorted(before.keys() - now.keys())]
    lines += [f"{key} is new" for key in sorted(now.keys() - before.keys())]
    for key in sorted(before.keys() & now.keys()):
        changed = [part for part, old, new in zip(parts, before[key], now[key], strict=True) if old != new]
        lines += [f"{key}: {' and '.join(changed)} changed"] if changed else []
    return lines
