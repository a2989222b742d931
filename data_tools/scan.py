"""A folder of pictures -> one record per usable picture, and one named problem for everything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data_tools.captioners import AUTO, Answer, Caption, caption_folder
from data_tools.captioners.kohya import folder_notes, repeats
from data_tools.errors import SEVERITIES, DataToolsError, Problem, RefusedError, grouped, shown
from data_tools.files import read_regular
from data_tools.fingerprints import phash, pixel_sha256, sha256
from data_tools.folder import Listing, list_folder, order
from data_tools.images import MAX_FILE_BYTES, MIN_SIDE, WHITE, Color, decode, load_image
from data_tools.records import ImageRecord

__all__ = ["ImageRecord", "Problem", "ScanResult", "inspect", "load_image", "scan"]

Progress = Callable[[int, int], None]
MAX_ASPECT = 4.0
"""Long side over short side; above this most buckets crop much of the picture away."""


@dataclass(frozen=True)
class ScanResult:
    """What a folder holds: every file in it is a record, was read for one, or is named in a problem."""

    folder: Path
    records: list[ImageRecord]
    problems: list[Problem]

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
            count = len(self.of("error"))
            raise DataToolsError(
                f"{shown(str(self.folder))} is not ready: {count} error{'s' if count > 1 else ''}, "
                f"{len(self.records)} usable pictures.",
                errors,
            )


def scan(
    folder: Path,
    *,
    captions: str = AUTO,
    template: str | None = None,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ScanResult:
    """Decode every picture under `folder`, find its captions, and name everything that is left out or odd.

    Nothing is written. Records come in the order of `folder.order`, whatever the number of workers.

    Args:
        folder: the dataset folder; searched through all levels.
        captions: "auto" (metadata.jsonl or .csv; else per picture: sidecar, kohya folder, template) or a name
            in `captioners.CAPTIONERS`.
        template: a sentence with the blanks {stem}, {folder}, {number}.
        background: red, green, blue shown where a picture is transparent.
        workers: threads that decode; None means one per CPU core, at most 8 (each may hold a 64 MP picture).
        progress: called as (done, total) after each picture, from the calling thread.

    Raises:
        UsageError: no such folder, or options that cannot be followed.
        DataToolsError: no picture in the folder at all.
    """
    listing = list_folder(folder)
    answer = caption_folder(listing, captions, template)
    masks = {caption.mask_file for caption in answer.captions.values() if caption.mask_file}
    if not listing.pictures:
        raise DataToolsError(
            f"There is no picture in {shown(str(folder))}; give the folder that holds them.",
            grouped([*listing.problems, *answer.problems]),
        )
    seen = _inspect_all(listing, background, workers, progress)
    broken = {problem.file_name for problem in seen.problems if problem.severity == "error"}
    # keep: one reason is enough; a picture that cannot be decoded need not be told to lack a caption as well.
    captioning = [problem for problem in answer.problems if problem.file_name not in broken]
    problems = [*listing.problems, *seen.problems, *captioning, *folder_notes(listing)]
    problems += _bad_masks(answer, seen.records)
    bad = {problem.file_name for problem in problems if problem.severity == "error"}
    records = [
        _captioned(record, answer.captions[name])
        for name, record in seen.records.items()
        if name in answer.captions and name not in masks and name not in bad
    ]
    problems += _changed(answer, records)
    problems += _duplicates(records)
    return ScanResult(listing.root, records, _sorted(problems))


def inspect(
    folder: Path, *, background: Color = WHITE, workers: int | None = None, progress: Progress | None = None
) -> ScanResult:
    """As `scan`, without looking for captions: all records have `captions=()`."""
    listing = list_folder(folder)
    seen = _inspect_all(listing, background, workers, progress)
    records = [replace(record, repeats=repeats(record.file_name)) for record in seen.records.values()]
    return ScanResult(listing.root, records, _sorted([*listing.problems, *seen.problems]))


@dataclass
class _Seen:
    records: dict[str, ImageRecord] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def _inspect_all(
    listing: Listing, background: Color, workers: int | None, progress: Progress | None
) -> _Seen:
    """Decode all pictures in threads (Pillow and hashlib release the interpreter lock), in listing order."""
    seen = _Seen()
    # keep: one decoder per core but few, because each may hold a 64 MP picture several times over.
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        results = pool.map(partial(_inspect_one, listing.root, background=background), listing.pictures)
        for done, (name, result) in enumerate(zip(listing.pictures, results, strict=True), start=1):
            if isinstance(result, Problem):
                seen.problems.append(result)
            else:
                seen.records[name] = result
                seen.problems.extend(_odd_shape(result))
            if progress is not None:
                progress(done, len(listing.pictures))
    finally:
        # keep: cancel, or Ctrl-C would first decode the rest of the folder.
        pool.shutdown(wait=True, cancel_futures=True)
    return seen


def _inspect_one(root: Path, name: str, *, background: Color) -> ImageRecord | Problem:
    """One picture: its record without captions, or why it cannot be used."""
    try:
        # keep: one read, so that the digest is of the very bytes that were decoded.
        data = read_regular(root / name, MAX_FILE_BYTES)
        image, notes = decode(data, background)
        if min(image.size) < MIN_SIDE:
            raise RefusedError(
                f"is {image.width} x {image.height} pixels",
                f"below {MIN_SIDE} pixels there is nothing for the autoencoder",
                "remove it",
            )
    except RefusedError as refusal:
        return refusal.problem(name)
    return ImageRecord(
        name,
        image.width,
        image.height,
        (),
        sha256=sha256(data),
        pixel_sha256=pixel_sha256(image),
        phash=phash(image),
        notes=notes,
    )


def _odd_shape(record: ImageRecord) -> Iterator[Problem]:
    aspect = max(record.width, record.height) / min(record.width, record.height)
    if aspect > MAX_ASPECT:
        yield Problem(
            record.file_name,
            f"is {record.width} x {record.height} pixels, {aspect:.1f} to 1",
            "no bucket is that narrow, so much of it will be cropped away",
            "crop it to what matters",
            "warning",
        )


def _captioned(record: ImageRecord, caption: Caption) -> ImageRecord:
    return replace(
        record,
        captions=caption.captions,
        source=caption.source,
        role=caption.role or "instance",
        repeats=caption.repeats or repeats(record.file_name),
        mask_file=caption.mask_file,
    )


def _bad_masks(answer: Answer, seen: dict[str, ImageRecord]) -> Iterator[Problem]:
    for name, caption in answer.captions.items():
        if caption.mask_file is None or name not in seen:
            continue
        mask = seen.get(caption.mask_file)
        if mask is None:
            yield Problem(
                name,
                f"has an unusable mask {caption.mask_file}",
                "the reason is told with that file",
                "mend the mask, or remove it from the row",
            )
        elif (mask.width, mask.height) != (seen[name].width, seen[name].height):
            yield Problem(
                name,
                f"has a mask of {mask.width} x {mask.height} pixels",
                f"the picture has {seen[name].width} x {seen[name].height}",
                "save the mask in the same size",
            )


def _changed(answer: Answer, records: list[ImageRecord]) -> Iterator[Problem]:
    """Pictures whose bytes are not those that the manifest was written for."""
    for record in records:
        before = answer.captions[record.file_name].sha256
        if before is not None and before != record.sha256:
            yield Problem(
                record.file_name,
                "has changed since the manifest was written",
                "its sha256 is another one",
                "look at it; scan with --write takes it as it is now",
                "warning",
            )


def _duplicates(records: list[ImageRecord]) -> Iterator[Problem]:
    first: dict[str, ImageRecord] = {}
    for record in records:
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
