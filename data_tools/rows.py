"""Rows of metadata.jsonl and metadata.csv, and which picture each of them means."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular
from data_tools.folder import Listing, inside
from data_tools.text import MAX_TEXT_BYTES, decode_text

MASK_COLUMN = "mask_file_name"
"""An imagefolder column: `datasets` shows it as a second picture called "mask"."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file; `place` is "metadata.jsonl line 3"."""

    place: str
    values: dict[str, Any]


@dataclass
class Rows:
    """The rows of one metadata file, and what could not be read of it."""

    name: str
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_rows(root: Path, name: str) -> Rows:
    """Read a metadata file; a row that cannot be read becomes a problem with its line and column."""
    found = Rows(name)
    try:
        text = decode_text(read_regular(root / name, MAX_TEXT_BYTES))
    except RefusedError as refusal:
        found.problems.append(refusal.problem(name))
        return found
    parse = _csv if name.endswith(".csv") else _jsonl
    for row in parse(name, text):
        if isinstance(row, Problem):
            found.problems.append(row)
        else:
            found.rows.append(row)
    return found


def _jsonl(name: str, text: str) -> Iterator[Row | Problem]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            yield Problem(
                f"{place}, column {error.colno}",
                f"is not JSON ({error.msg})",
                "the row cannot be read",
                'write one object per line, such as {"file_name": "a.png", "text": "a photo"}',
            )
            continue
        except (ValueError, RecursionError) as error:
            yield Problem(
                place,
                f"is not usable JSON ({error})",
                "the row cannot be read",
                "write plain text and numbers",
            )
            continue
        if isinstance(values, dict):
            yield Row(place, values)
        else:
            yield Problem(
                place,
                f"holds {type(values).__name__}, not an object",
                "columns have names",
                'write one object per line, such as {"file_name": "a.png", "text": "a photo"}',
            )


def _csv(name: str, text: str) -> Iterator[Row | Problem]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
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


def match_rows(rows: list[Row], listing: Listing) -> tuple[dict[str, Row], list[Problem]]:
    """Which picture each row means: {file_name as on disk: row}, and the rows that mean none or one taken."""
    matched: dict[str, Row] = {}
    problems: list[Problem] = []
    find = Finder(listing)
    for row in rows:
        try:
            name = find(row.values.get("file_name"))
        except RefusedError as refusal:
            problems.append(refusal.problem(row.place))
            continue
        if name in matched:
            problems.append(
                Problem(
                    row.place,
                    f"names {name} again, after {matched[name].place}",
                    "a picture has one row",
                    "remove one of them; say `repeats` to see it more often",
                )
            )
        else:
            matched[name] = row
    return matched, problems


class Finder:
    """From a name written in metadata to the name on disk, confined to the folder."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.exact = set(listing.pictures)
        self.composed = {unicodedata.normalize("NFC", name): name for name in listing.pictures}
        self.folded = {name.casefold(): name for name in listing.pictures}

    def __call__(self, written: object) -> str:
        """The file meant by `written`; NFC and NFD spellings of a name are the same name.

        Raises:
            RefusedError: no name, a way out of the folder, or no such picture.
        """
        if written is None:
            raise RefusedError(
                "has no file_name",
                "nothing says which picture it describes",
                "add it, relative to this folder",
            )
        name = inside(written)
        if name is None:
            raise RefusedError(
                f"names {written!r}",
                "only files inside the folder are read (no .., absolute path or address)",
                "copy the picture into the folder and name it relative to it",
            )
        found = name if name in self.exact else self.composed.get(unicodedata.normalize("NFC", name))
        if found is not None:
            return found
        near = self.folded.get(name.replace("\\", "/").casefold())
        if near is not None:
            raise RefusedError(
                f"names {name!r}, but the file is called {near!r}",
                "other systems tell the two apart",
                f"write {near!r}",
            )
        known = next((problem for problem in self.listing.problems if problem.file_name == name), None)
        if known is not None:
            raise RefusedError(f"names {name!r}, which {known.what}", known.why, known.remedy)
        raise RefusedError(f"names {name!r}", "there is no such picture", "add the file, or remove the row")
