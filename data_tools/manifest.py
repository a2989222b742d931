"""The manifest: metadata.jsonl at the top of the folder, one row per picture.

It is an imagefolder: `datasets.load_dataset("imagefolder", data_dir=folder)` reads it with all our columns.
A text of several lines is several captions, as in caption files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from data_tools.captioners.columns import LOSS_WEIGHT, consumed
from data_tools.captioners.metadata import parse_row
from data_tools.errors import DataToolsError, Problem, RefusedError, shown, stop_for_errors
from data_tools.files import read_regular, storage_errors, whole_file
from data_tools.fingerprints import sha256
from data_tools.folder import METADATA, Listing, list_folder
from data_tools.images import MAX_FILE_BYTES
from data_tools.pool import in_threads
from data_tools.records import RECORD, ImageRecord
from data_tools.rows import MASK_COLUMN, Finder, Row, match_rows, read_rows
from data_tools.shelves import NamedShelf, Shelf
from data_tools.verdicts import FOCUS_HEIGHT, FOCUS_WIDTH, FOCUS_X, FOCUS_Y, REASONS, VERDICT, columns_of

T = TypeVar("T")
NAME = "metadata.jsonl"
OTHERS = tuple(name for name in METADATA if name != NAME)
SOURCES = ("sidecar", "metadata", "template", "filename", "kohya folder")
OURS = (
    "file_name",
    "text",
    "width",
    "height",
    "role",
    "repeats",
    "sha256",
    "pixel_sha256",
    "phash",
    "source",
    "notes",
    MASK_COLUMN,
    LOSS_WEIGHT,
    VERDICT,
    REASONS,
    FOCUS_X,
    FOCUS_Y,
    FOCUS_WIDTH,
    FOCUS_HEIGHT,
)
_OURS = frozenset(OURS)
SCAN_AGAIN = "scan the folder again with --write"


def write(folder: Path, records: Iterable[ImageRecord], columns: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write folder/metadata.jsonl in one step: a crash leaves the old file whole.

    The same records give the same bytes. Columns of an older metadata.jsonl that we do not know (a licence,
    an author) are kept for the pictures that stay; `columns` {file_name: {column: value}} adds to them and
    replaces them, and the value None takes a column out.

    Raises:
        DataToolsError: a metadata.csv or .parquet is there, or the older file cannot be read.
        StorageError: the new one cannot be written.
    """
    root = Path(folder)
    for other in OTHERS:
        if (root / other).exists():
            raise DataToolsError(
                f"{shown(str(folder))} holds {other}, and `datasets` refuses a second metadata file; "
                f"move {other} away (its captions are in the scan)."
            )
    records = records if isinstance(records, Sequence) else Shelf(records, *RECORD)
    before = read_columns(root, Listing(root, Shelf(record.file_name for record in records)))
    ordered, foreign = Shelf[ImageRecord]((), *RECORD), Shelf[dict[str, Any]]()
    for record in records:
        values = before.get(record.file_name, {})
        ordered.append(_with_source(record, values))
        foreign.append(_foreign(values))
    optional = _optional_columns(ordered)
    extra = columns or {}
    with storage_errors(root / NAME), whole_file(root / NAME) as file:
        for record, others in zip(ordered, foreign, strict=True):
            row = _merged(_row(record, optional), others, extra.get(record.file_name, {}))
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return root / NAME


def read_columns(folder: Path, listing: Listing | None = None) -> Mapping[str, dict[str, Any]]:
    """All columns of metadata.jsonl as they stand, by file name; empty when there is none.

    Args:
        folder: the dataset folder.
        listing: its pictures, where they are known; else they are looked for.

    Raises:
        UsageError: no such folder.
        DataToolsError: rows that cannot be read.
    """
    root = Path(folder)
    if not (root / NAME).exists():
        return {}
    unreadable: list[Problem] = []
    rows = _without(unreadable, read_rows(root, NAME))
    columns = NamedShelf[dict[str, Any]]()
    for name, row in _without([], match_rows(rows, Finder(listing or list_folder(root)))):
        columns[name] = row.values
    why = f"The {NAME} that is there cannot be read, so it is not replaced; mend it or move it away:"
    stop_for_errors(why, unreadable)
    return columns


def _without(problems: list[Problem], found: Iterable[T | Problem]) -> Iterator[T]:
    """What is no problem; those go to `problems`."""
    for each in found:
        if isinstance(each, Problem):
            problems.append(each)
        else:
            yield each


def _merged(row: dict[str, Any], foreign: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**row, **foreign, **extra}
    return {key: value for key, value in merged.items() if key not in extra or value is not None}


def _optional_columns(records: Sequence[ImageRecord]) -> tuple[str, ...]:
    """Columns that are written only when a picture needs them; then all rows have them, as Arrow wants it."""
    needed: set[str] = set()
    for record in records:
        needed.update(name for name, test in OPTIONAL.items() if test(record))
    return tuple(name for name in OPTIONAL if name in needed)


OPTIONAL: dict[str, Callable[[ImageRecord], object]] = {
    MASK_COLUMN: lambda record: record.mask_file,
    LOSS_WEIGHT: lambda record: record.loss_weight != 1,
    VERDICT: lambda record: record.verdict != "keep",
    REASONS: lambda record: record.verdict_reasons,
    FOCUS_X: lambda record: record.focus,
    FOCUS_Y: lambda record: record.focus,
    FOCUS_WIDTH: lambda record: record.focus and record.focus.width,
    FOCUS_HEIGHT: lambda record: record.focus and record.focus.width,
}
"""Columns, and which pictures need them."""


def _row(record: ImageRecord, optional: tuple[str, ...]) -> dict[str, Any]:
    row = {
        "file_name": record.file_name,
        "text": "\n".join(record.captions),
        "width": record.width,
        "height": record.height,
        "role": record.role,
        "repeats": record.repeats,
        "sha256": record.sha256,
        "pixel_sha256": record.pixel_sha256,
        "phash": record.phash,
        "source": record.source,
        # keep: text, because a column of lists that are all empty has no type for Arrow.
        "notes": "; ".join(record.notes),
    }
    extra = {MASK_COLUMN: record.mask_file, LOSS_WEIGHT: record.loss_weight, **columns_of(record)}
    return row | {name: extra[name] for name in optional}


def _foreign(values: dict[str, Any]) -> dict[str, Any]:
    foreign = values.keys() - _OURS
    known = consumed(values) if foreign else ()
    return {key: value for key, value in values.items() if key in foreign and key not in known}


def _with_source(record: ImageRecord, before: Mapping[str, Any]) -> ImageRecord:
    """A caption that was read from the manifest itself keeps where it first came from."""
    first = before.get("source")
    return replace(record, source=first) if record.source == "metadata" and first in SOURCES else record


def read(folder: Path, *, check_bytes: bool = True) -> Sequence[ImageRecord]:
    """Read and verify a manifest written by `write`, in its order.

    Args:
        folder: the dataset folder.
        check_bytes: also compare every picture's sha256 with the manifest (reads all files, decodes none).

    Raises:
        UsageError: no such folder.
        DataToolsError: naming every row without a file, file without a row, second row of a file, path out of
            the folder, changed file and unreadable row at once.
    """
    listing = list_folder(folder)
    if NAME not in listing.metadata:
        raise DataToolsError(f"{shown(str(folder))} has no {NAME}; {SCAN_AGAIN} to make it.")
    problems = [*listing.problems]
    find = Finder(listing)
    records = Shelf((), *RECORD)
    told, masks = NamedShelf[None](), set()
    for name, row in _without(problems, match_rows(read_rows(listing.root, NAME), find)):
        told[name] = None
        try:
            record = _record(name, row, find)
        except RefusedError as refusal:
            problems.append(refusal.problem(f"{name} ({row.place})"))
        else:
            records.append(record)
            masks.add(record.mask_file)
    problems += [
        Problem(
            name,
            f"has no row in {NAME}",
            "it would be left out in silence",
            f"{SCAN_AGAIN}, or move it out of the folder",
        )
        for name in listing.pictures
        if name not in told and name not in masks
    ]
    if check_bytes:
        problems += _changed(listing, records)
    stop_for_errors(f"The manifest of {shown(str(folder))} does not fit the folder:", problems)
    return records


def _record(name: str, row: Row, find: Finder) -> ImageRecord:
    caption = parse_row(row, find)
    values = row.values
    for column, kind in (("width", int), ("height", int), ("sha256", str), ("pixel_sha256", str), ("phash", str)):
        if not isinstance(values.get(column), kind):
            raise RefusedError(f"has no usable {column}", "the row was not written by a scan", SCAN_AGAIN)
    if min(values["width"], values["height"]) < 1:
        raise RefusedError(
            f"is {values['width']} x {values['height']} pixels", "a picture has at least one", SCAN_AGAIN
        )
    return ImageRecord(
        file_name=name,
        width=values["width"],
        height=values["height"],
        captions=caption.captions,
        role=caption.role or "instance",
        repeats=caption.repeats or 1,
        loss_weight=caption.loss_weight,
        sha256=values["sha256"],
        pixel_sha256=values["pixel_sha256"],
        phash=values["phash"],
        mask_file=caption.mask_file,
        source=values["source"] if values.get("source") in SOURCES else "metadata",
        notes=tuple(str(values["notes"]).split("; ")) if values.get("notes") else (),
        verdict=caption.verdict,
        verdict_reasons=caption.verdict_reasons,
        focus=caption.focus,
    )


def _changed(listing: Listing, records: Sequence[ImageRecord]) -> list[Problem]:
    """Pictures whose bytes differ from those that were scanned; a changed byte often still decodes."""

    def check(record: ImageRecord) -> Problem | None:
        try:
            digest = sha256(read_regular(listing.root / record.file_name, MAX_FILE_BYTES))
        except RefusedError as refusal:
            return refusal.problem(record.file_name)
        if digest == record.sha256:
            return None
        return Problem(
            record.file_name,
            "has changed since it was scanned",
            "its size, captions or pixels may be others",
            SCAN_AGAIN,
        )

    return [problem for problem in in_threads(check, records, None) if problem is not None]
