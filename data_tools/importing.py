"""From any source to a dataset folder: files are written beside and renamed, the metadata last.

An import that was killed goes on: files that are there with the same content are kept. A folder that holds
anything else is refused, so that two datasets never mix.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UNSAFE, Problem, RefusedError, UsageError, shown
from data_tools.files import storage_errors, whole_file, write_atomic
from data_tools.folder import METADATA, OWN, inside
from data_tools.inspection import Progress
from data_tools.manifest import NAME
from data_tools.rows import Row, plain, read_rows
from data_tools.shelves import NamedShelf
from data_tools.sources import File, Order, choose

MARK = f"{OWN}/import.json"
"""Says what a folder is filled from."""
MAX_NAME_BYTES = 255
ROWS = f"{OWN}/rows.jsonl"
"""Rows of the pictures as they come, until all of them are known."""
PART = ".part-import"
"""What a file is called while it is written."""


@dataclass
class Imported:
    """What an import did."""

    source: str
    """Name of the source in `sources.SOURCES`."""
    folder: Path
    new: int = 0
    """Files written now."""
    kept: int = 0
    """Files that an earlier, interrupted or finished import had written."""
    problems: list[Problem] = field(default_factory=list)


def import_pictures(order: Order, output: Path, progress: Progress | None = None) -> Imported:
    """Fill the folder `output` from a source; afterwards it scans and loads like any imagefolder.

    Args:
        order: what to import.
        output: a new or empty folder, or one that the same import has begun.
        progress: called as (files done, 0) after each one; how many there will be is not known.

    Raises:
        UsageError: the source is not known or cannot be followed, or the folder holds something else.
        DataToolsError: the source is damaged, or refused for safety (exit code 8).
        StorageError: the disk is full or read-only.
    """
    name, source = choose(order.place)
    root = Path(output)
    _claim(root, order, name)
    done = Imported(name, root)
    try:
        _fill(root, source.read(order), done, progress)
        _write_metadata(root, done)
    finally:
        (root / ROWS).unlink(missing_ok=True)
    return done


def _fill(root: Path, items: Iterable[File | Problem], done: Imported, progress: Progress | None) -> None:
    with storage_errors(root / ROWS), open(root / ROWS, "wb") as rows:
        for item in items:
            if isinstance(item, Problem):
                done.problems.append(item)
                continue
            try:
                _write(root, item, done)
                if item.columns is not None:
                    rows.write(_line({"file_name": inside(item.name), **item.columns}))
            except RefusedError as refusal:
                done.problems.append(refusal.problem(item.name))
            if progress is not None:
                progress(done.new + done.kept, 0)


def _claim(root: Path, order: Order, source: str) -> None:
    """Make the folder this import's, or go on in one that already is."""
    said = {"source": source, **asdict(order)}
    mark = root / MARK
    try:
        before = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(
            f"{shown(str(root))} is not empty, and its files could mix with the new ones; "
            "choose a new folder with -o, or empty it first."
        )
    if before is not None and before != said and any(path != mark for path in root.rglob("*") if path.is_file()):
        raise UsageError(
            f"{shown(str(root))} was filled from {shown(str(before.get('place')))}; choose a new folder with -o."
        )
    with storage_errors(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(mark, json.dumps(said, indent=2).encode())
        for part in root.rglob(PART):
            part.unlink()


def _write(root: Path, file: File, done: Imported) -> None:
    name = inside(file.name)
    if name is None:
        raise RefusedError("leads out of the folder", "an import fills one folder only", "rename it", UNSAFE)
    if name.encode(errors="replace").decode() != name:
        raise RefusedError("has a name that is not UTF-8", "no manifest can name it", "rename it in the source")
    if max(len(os.fsencode(part)) for part in name.split("/")) > MAX_NAME_BYTES:
        raise RefusedError("has a name above 255 bytes", "no file system holds it", "rename it in the source")
    # keep: `datasets` takes one metadata file only, and a manifest is a metadata.jsonl.
    path = root / OWN / name if name in METADATA else root / name
    with storage_errors(path):
        if path.exists():
            if not _same(path, file.content):
                raise RefusedError(
                    "is there already with other content",
                    "the source names it twice, or (on Windows and macOS) another file differs in case only",
                    "rename one of them in the source, or import into a new folder",
                )
            done.kept += 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, file.content)
            done.new += 1


def _write_metadata(root: Path, done: Imported) -> None:
    """Write metadata.jsonl last; rows that an earlier import wrote, and somebody may have edited, stay."""
    there, before = NamedShelf[None](), []
    for old in _kept_rows(root):
        if isinstance(old, Problem):
            before.append(old)
        else:
            there[str(old.values.get("file_name"))] = None
    done.problems += before
    kept = (old.values for old in _kept_rows(root) if isinstance(old, Row))
    new = (row for row in _new_rows(root, done) if str(row.get("file_name")) not in there)
    first = next(new, None)
    if first is not None and not before:
        with storage_errors(root / NAME), whole_file(root / NAME) as file:
            for row in itertools.chain(kept, [first], new):
                file.write(_line(row))


def _kept_rows(root: Path) -> Iterable[Row | Problem]:
    return read_rows(root, NAME) if (root / NAME).exists() else ()


def _new_rows(root: Path, done: Imported) -> Iterator[dict[str, Any]]:
    """Rows that came with the pictures, then those of the source's own metadata files."""
    with open(root / ROWS, "rb") as rows:
        yield from map(json.loads, rows)
    for name in METADATA:
        if (root / OWN / name).exists():
            for row in read_rows(root / OWN, name):
                if isinstance(row, Problem):
                    done.problems.append(row)
                else:
                    yield plain(row.values)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _same(path: Path, content: bytes | Path) -> bool:
    if isinstance(content, Path):
        return filecmp.cmp(content, path)
    return path.stat().st_size == len(content) and path.read_bytes() == content


def _copy(path: Path, content: bytes | Path) -> None:
    """Write beside and rename, so that a killed import leaves whole files only."""
    part = path.parent / PART
    if isinstance(content, Path):
        # keep: with its times, by which a repeated import knows it without reading it.
        shutil.copy2(content, part)
    else:
        part.write_bytes(content)
    os.replace(part, path)
