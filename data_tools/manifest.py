"""The manifest: metadata.jsonl at the top of the folder, one row per picture.

It is an imagefolder: `datasets.load_dataset("imagefolder", data_dir=folder)` reads it with all our columns.
A text of several lines is several captions, as in caption files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.captioners.columns import LOSS_WEIGHT, consumed
from data_tools.captioners.metadata import parse_row
from data_tools.errors import DataToolsError, Problem, RefusedError, shown, stop_for_errors
from data_tools.files import read_regular, whole_file
from data_tools.fingerprints import sha256
from data_tools.folder import METADATA, Listing, list_folder
from data_tools.images import MAX_FILE_BYTES
from data_tools.pool import in_threads
from data_tools.records import ImageRecord
from data_tools.rows import MASK_COLUMN, Finder, Row, match_rows, read_rows
from data_tools.verdicts import FOCUS_X, FOCUS_Y, REASONS, VERDICT, columns_of

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
)
SCAN_AGAIN = "scan the folder again with --write"


def write(folder: Path, records: Iterable[ImageRecord], columns: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write folder/metadata.jsonl in one step: a crash leaves the old file whole.

    The same records give the same bytes. Columns of an older metadata.jsonl that we do not know (a licence,
    an author) are kept for the pictures that stay; `columns` {file_name: {column: value}} adds to them and
    replaces them, and the value None takes a column out.

    Raises:
        DataToolsError: a metadata.csv or .parquet is there, or the older file cannot be read, or the new one written.
    """
    root = Path(folder)
    for other in OTHERS:
        if (root / other).exists():
            raise DataToolsError(
                f"{shown(str(folder))} holds {other}, and `datasets` refuses a second metadata file; "
                f"move {other} away (its captions are in the scan)."
            )
    before = read_columns(root)
    foreign = {name: _foreign(values) for name, values in before.items()}
    ordered = [_with_source(record, before.get(record.file_name, {})) for record in records]
    optional = _optional_columns(ordered)
    extra = columns or {}
    try:
        with whole_file(root / NAME) as file:
            for record in ordered:
                name = record.file_name
                row = _merged(_row(record, optional), foreign.get(name, {}), extra.get(name, {}))
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise DataToolsError(
            f"{shown(str(root / NAME))} cannot be written ({error.strerror}); free space or mend the permissions."
        ) from error
    return root / NAME


def read_columns(folder: Path) -> dict[str, dict[str, Any]]:
    """All columns of metadata.jsonl as they stand, by file name; empty when there is none.

    Raises:
        UsageError: no such folder.
        DataToolsError: rows that cannot be read.
    """
    root = Path(folder)
    if not (root / NAME).exists():
        return {}
    found = read_rows(root, NAME)
    why = f"The {NAME} that is there cannot be read, so it is not replaced; mend it or move it away:"
    stop_for_errors(why, found.problems)
    matched, _ = match_rows(found.rows, list_folder(root))
    return {name: dict(row.values) for name, row in matched.items()}


def _merged(row: dict[str, Any], foreign: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**row, **foreign, **extra}
    return {key: value for key, value in merged.items() if key not in extra or value is not None}


def _optional_columns(records: list[ImageRecord]) -> tuple[str, ...]:
    """Columns that are written only when a picture needs them; then all rows have them, as Arrow wants it."""
    tests = {
        MASK_COLUMN: any(record.mask_file for record in records),
        LOSS_WEIGHT: any(record.loss_weight != 1 for record in records),
        VERDICT: any(record.verdict != "keep" for record in records),
        REASONS: any(record.verdict_reasons for record in records),
        FOCUS_X: any(record.focus for record in records),
        FOCUS_Y: any(record.focus for record in records),
    }
    return tuple(name for name, needed in tests.items() if needed)


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
    known = {*OURS, *consumed(values)}
    return {key: value for key, value in values.items() if key not in known}


def _with_source(record: ImageRecord, before: Mapping[str, Any]) -> ImageRecord:
    """A caption that was read from the manifest itself keeps where it first came from."""
    first = before.get("source")
    return replace(record, source=first) if record.source == "metadata" and first in SOURCES else record


def read(folder: Path, *, check_bytes: bool = True) -> list[ImageRecord]:
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
    found = read_rows(listing.root, NAME)
    matched, unmatched = match_rows(found.rows, listing)
    problems = [*listing.problems, *found.problems, *unmatched]
    find = Finder(listing)
    records: list[ImageRecord] = []
    for name, row in matched.items():
        try:
            records.append(_record(name, row, find))
        except RefusedError as refusal:
            problems.append(refusal.problem(f"{name} ({row.place})"))
    masks = {record.mask_file for record in records}
    problems += [
        Problem(
            name,
            f"has no row in {NAME}",
            "it would be left out in silence",
            f"{SCAN_AGAIN}, or move it out of the folder",
        )
        for name in listing.pictures
        if name not in matched and name not in masks
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


def _changed(listing: Listing, records: list[ImageRecord]) -> list[Problem]:
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
