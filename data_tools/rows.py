"""Rows of metadata.jsonl, metadata.csv and metadata.parquet, and which picture each of them means."""

from __future__ import annotations

import csv
import datetime
import importlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.errors import DATA, UNSAFE, Problem, RefusedError
from data_tools.files import open_regular
from data_tools.folder import Listing, inside
from data_tools.shelves import Lookup, NamedShelf, Shelf
from data_tools.text import MAX_ROWS_BYTES, open_text

MASK_COLUMN = "mask_file_name"
"""An imagefolder column: `datasets` shows it as a second picture called "mask"."""
MASK_COLUMNS = (MASK_COLUMN, "mask_file")
"""Both are read; the first is written."""


EXAMPLE = 'write one object, such as {"file_name": "a.png", "text": "a photo"}'


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file; `place` is "metadata.jsonl line 3"."""

    place: str
    values: dict[str, Any]


def read_rows(root: Path, name: str) -> Iterator[Row | Problem]:
    """The rows of a metadata file, one after the other; one that cannot be read is a problem with line and column."""
    try:
        yield from PARSERS[PurePosixPath(name).suffix](name, root / name)
    except RefusedError as refusal:
        yield refusal.problem(name)


def json_object(text: str) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        RefusedError: no JSON, telling line and column where it breaks off; or no object.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise RefusedError(
            f"is not JSON at {line}column {error.colno} ({error.msg})", "it cannot be read", EXAMPLE
        ) from error
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            f"is not usable JSON ({error})", "it cannot be read", "write plain text and numbers"
        ) from error
    if not isinstance(values, dict):
        raise RefusedError(f"holds {type(values).__name__}, not an object", "columns have names", EXAMPLE)
    return values


def _jsonl(name: str, path: Path) -> Iterator[Row | Problem]:
    # keep: not universal newlines, which also split at what JSON allows in a string.
    with open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{name} line {number}"
                try:
                    yield Row(place, json_object(line.removesuffix("\n")))
                except RefusedError as refusal:
                    yield refusal.problem(place)


def _parquet(name: str, path: Path) -> Iterator[Row | Problem]:
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with open_regular(path, MAX_ROWS_BYTES) as file:
            yield from _parquet_rows(name, parquet.ParquetFile(file))
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # pyarrow's errors are these
        raise RefusedError(
            f"is not parquet ({str(error).splitlines()[0]})",
            "its rows cannot be read",
            "write it again (pandas: to_parquet), or as metadata.jsonl",
        ) from error


def _parquet_rows(name: str, table: Any) -> Iterator[Row]:
    number = 0
    for batch in table.iter_batches(1024):
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{name} row {number}", values)


def _csv(name: str, path: Path) -> Iterator[Row | Problem]:
    with open_text(path, newline="") as lines:
        yield from _csv_rows(name, csv.DictReader(lines, strict=True))


def _csv_rows(name: str, reader: csv.DictReader[str]) -> Iterator[Row | Problem]:
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Problem(
                f"{name} line {reader.line_num}",
                f"is not CSV ({error})",
                "the rows from here on cannot be read",
                "close every quote, and double the quotes inside a text",
            )
            return
        if values is None:
            return
        place = f"{name} line {reader.line_num}"
        if None in values or any(value is None for value in values.values()):
            yield Problem(
                place,
                f"does not have the {len(reader.fieldnames or ())} columns of the first line",
                "a comma inside a text splits it",
                'put texts in quotes: "a dog, sitting"',
            )
        else:
            yield Row(place, dict(values))


PARSERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
"""By the ending of the metadata file."""


def plain(value: Any) -> Any:
    """A value that JSON can hold; bytes become their length, because a second picture is not a column of text."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time | datetime.timedelta | Decimal):
        return str(value)
    return value


def match_rows(rows: Iterable[Row | Problem], find: Finder) -> Iterator[tuple[str, Row] | Problem]:
    """Which picture each row means: (file_name as on disk, row); or a problem: the rows that mean none or one taken."""
    places = NamedShelf[str]()
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        try:
            name = find(row.values.get("file_name"))
        except RefusedError as refusal:
            yield refusal.problem(row.place)
            continue
        before = places.get(name)
        if before is None:
            places[name] = row.place
            yield name, row
        else:
            yield Problem(
                row.place,
                f"names {name} again, after {before}",
                "a picture has one row",
                "remove one of them; say `repeats` to see it more often",
            )


class Finder:
    """From a name written in metadata to the name on disk, confined to the folder."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.names = Shelf([*listing.pictures, *listing.masks.values()]) if listing.masks else listing.pictures

    @cached_property
    def exact(self) -> Lookup[str]:
        """By the very name."""
        return Lookup(self.names, str)

    @cached_property
    def composed(self) -> Lookup[str]:
        """By the composed form of the name."""
        return Lookup(self.names, partial(unicodedata.normalize, "NFC"))

    @cached_property
    def folded(self) -> Lookup[str]:
        """By the name in lower case."""
        return Lookup(self.names, str.casefold)

    def __call__(self, written: object) -> str:
        """The file meant by `written`; NFC and NFD spellings of a name are the same name.

        Raises:
            RefusedError: no name, a way out of the folder, or no such picture.
        """
        if written is None:
            raise RefusedError(
                "has no file_name", "nothing says which picture it describes", "add it, relative to this folder"
            )
        name = inside(written)
        if name is None:
            raise RefusedError(
                f"names {written!r}",
                "only files inside the folder are read (no .., absolute path or address)",
                "copy the picture into the folder and name it relative to it",
                UNSAFE if isinstance(written, str) and written.strip() else DATA,
            )
        found = self.exact(name) or self.composed(unicodedata.normalize("NFC", name))
        if found:
            return found[-1]
        near = self.folded(name.replace("\\", "/").casefold())
        if near:
            raise RefusedError(
                f"names {name!r}, but the file is called {near[-1]!r}",
                "other systems tell the two apart",
                f"write {near[-1]!r}",
            )
        known = next((problem for problem in self.listing.problems if problem.file_name == name), None)
        if known is not None:
            raise RefusedError(f"names {name!r}, which {known.what}", known.why, known.remedy, known.code)
        raise RefusedError(f"names {name!r}", "there is no such picture", "add the file, or remove the row")
