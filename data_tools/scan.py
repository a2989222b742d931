"""A folder of pictures -> one record per usable picture, and one named problem for everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.captioners import AUTO, Caption, caption_folder
from data_tools.captioners.kohya import folder_notes, repeats
from data_tools.errors import SEVERITIES, DataToolsError, Problem, counted, gravest, grouped, shown
from data_tools.folder import Listing, list_folder, order
from data_tools.images import WHITE, Color
from data_tools.inspection import Looking, Progress, Seen, inspect_all
from data_tools.memory import Memory
from data_tools.records import RECORD, ImageRecord
from data_tools.shelves import Index, Shelf
from data_tools.sources import advice

__all__ = ["ImageRecord", "Problem", "Progress", "ScanResult", "inspect", "scan"]


@dataclass(frozen=True)
class ScanResult:
    """What a folder holds: every file in it is a record, was read for one, or is named in a problem."""

    folder: Path
    records: Sequence[ImageRecord]
    problems: list[Problem]
    decoded: int = 0
    """Pictures that were decoded; an earlier scan had seen the others."""
    uncaptioned: Sequence[ImageRecord] = ()
    """Pictures that decode well and have no usable caption or mask; the problems say why."""

    def of(self, severity: str) -> list[Problem]:
        """The problems of one severity: "error", "warning" or "note"."""
        return [problem for problem in self.problems if problem.severity == severity]

    def raise_for_errors(self) -> None:
        """Stop when anything is wrong enough to keep a picture out.

        Raises:
            DataToolsError: naming every error at once.
        """
        errors = grouped(self.of("error"))
        if errors:
            count, usable = counted(len(self.of("error")), "error"), counted(len(self.records), "usable picture")
            raise DataToolsError(
                f"{shown(str(self.folder))} is not ready: {count}, {usable}.", errors, gravest(self.problems)
            )


def scan(
    folder: Path,
    *,
    captions: str = AUTO,
    template: str | None = None,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> ScanResult:
    """Decode every picture under `folder`, find its captions, and name everything that is left out or odd.

    Nothing is written. Records come in the order of `folder.order`, whatever the number of workers.

    Args:
        folder: the dataset folder; searched through all levels.
        captions: "auto" (metadata.jsonl, .csv or .parquet; else per picture: sidecar, kohya folder, template) or a name
            in `captioners.CAPTIONERS`.
        template: a sentence with the blanks {stem}, {folder}, {number}.
        background: red, green, blue shown where a picture is transparent.
        workers: how many decode at once; None: see `pool.count_of`.
        progress: called as (done, total) after each picture, from the calling thread.
        memory: what earlier scans saw of this folder; pictures that have not changed are not decoded again.

    Raises:
        UsageError: no such folder, or options that cannot be followed.
        DataToolsError: no picture in the folder at all.
        StorageError: the memory's disk is full.
    """
    listing = list_folder(folder)
    answer = caption_folder(listing, captions, template)
    if not listing.pictures:
        raise DataToolsError(
            f"There is no picture in {shown(str(folder))}; {advice(str(folder)) or 'give the folder that holds them.'}",
            grouped([*listing.problems, *answer.problems]),
        )
    seen = inspect_all(listing, Looking(background, workers, progress, memory))
    broken = {problem.file_name for problem in seen.problems if problem.severity == "error"}
    # keep: one reason is enough; a picture that cannot be decoded need not be told to lack a caption as well.
    captioning = [problem for problem in answer.problems if problem.file_name not in broken]
    problems = [*listing.problems, *seen.problems, *captioning, *folder_notes(listing)]
    named = {name: caption.mask_file for name, caption in answer.captions.each() if caption.mask_file}
    problems += _mask_conflicts(listing, named)
    # keep: what metadata names counts more than what was found by name.
    masks_of = {**listing.masks, **named}
    problems += _bad_masks(masks_of, seen)
    bad = {problem.file_name for problem in problems if problem.severity == "error"}
    records, uncaptioned, pixels = Shelf((), *RECORD), Shelf((), *RECORD), Index()
    others = {*named.values(), *listing.masks.values()}
    captioned = answer.captions.gather(seen.names)
    for (name, outcome), (_, caption) in zip(seen.found.gather(seen.names), captioned, strict=True):
        if isinstance(outcome, Problem) or outcome is None or name in others:
            continue
        if caption is None or name in bad:
            uncaptioned.append(replace(outcome, repeats=repeats(name)))
            continue
        records.append(_captioned(outcome, caption, masks_of.get(name)))
        pixels.add(outcome.pixel_sha256)
        if caption.sha256 not in (None, outcome.sha256):
            problems.append(_changed(name))
    problems += _duplicates(records, pixels)
    return ScanResult(listing.root, records, _sorted(problems), seen.decoded, uncaptioned)


def inspect(
    folder: Path,
    *,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> ScanResult:
    """As `scan`, without looking for captions: all records have `captions=()`."""
    listing = list_folder(folder)
    seen = inspect_all(listing, Looking(background, workers, progress, memory))
    masks = set(listing.masks.values())
    pictures = (record for record in seen.records() if record.file_name not in masks)
    records = Shelf((replace(record, repeats=repeats(record.file_name)) for record in pictures), *RECORD)
    return ScanResult(listing.root, records, _sorted([*listing.problems, *seen.problems]), seen.decoded)


def _captioned(record: ImageRecord, caption: Caption, mask: str | None) -> ImageRecord:
    # keep: not `replace`, which takes five times as long.
    return ImageRecord(
        record.file_name,
        record.width,
        record.height,
        caption.captions,
        caption.role or "instance",
        caption.repeats or repeats(record.file_name),
        caption.loss_weight,
        record.sha256,
        record.pixel_sha256,
        record.phash,
        mask,
        caption.source,
        record.notes,
        caption.verdict,
        caption.verdict_reasons,
        caption.focus,
    )


def _mask_conflicts(listing: Listing, named: dict[str, str]) -> Iterator[Problem]:
    for name, mask in listing.masks.items():
        if named.get(name, mask) != mask:
            yield Problem(
                name,
                f"has the mask {mask} by its name, and its row names {named[name]}",
                "the row is followed",
                "remove one of the two",
                "warning",
            )


def _bad_masks(masks: dict[str, str], seen: Seen) -> Iterator[Problem]:
    for name, mask_file in masks.items():
        record, mask = seen.record(name), seen.record(mask_file)
        if record is None:
            continue
        if mask is None:
            yield Problem(
                name,
                f"has an unusable mask {mask_file}",
                "the reason is told with that file",
                "mend the mask, or remove it",
            )
        elif (mask.width, mask.height) != (record.width, record.height):
            yield Problem(
                name,
                f"has a mask of {mask.width} x {mask.height} pixels",
                f"the picture has {record.width} x {record.height}",
                "save the mask in the same size",
            )


def _changed(name: str) -> Problem:
    """The bytes of a picture are not those that the manifest was written for."""
    return Problem(
        name,
        "has changed since the manifest was written",
        "its sha256 is another one",
        "look at it; scan with --write takes it as it is now",
        "warning",
    )


def _duplicates(records: Sequence[ImageRecord], pixels: Index) -> Iterator[Problem]:
    first: dict[str, ImageRecord] = {}
    for place in pixels.repeated():
        record = records[place]
        known = first.setdefault(record.pixel_sha256, record)
        if known is not record:
            same = "" if known.captions == record.captions else ", under another caption"
            yield Problem(
                record.file_name,
                f"shows exactly the pixels of {known.file_name}{same}",
                "it counts twice, and a copy in the validation set would hide overfitting",
                "remove one; repeats say what should be seen more often",
                "warning",
            )


def _sorted(problems: list[Problem]) -> list[Problem]:
    """Errors first, then by name: the same list for the same folder."""
    rank = {name: place for place, name in enumerate(order({problem.file_name for problem in problems}))}
    return sorted(problems, key=lambda problem: (SEVERITIES.index(problem.severity), rank[problem.file_name]))
