"""From any source to a dataset folder: files are written beside and renamed, the metadata last.

An import that was killed goes on: files that are there with the same content are kept. A folder that holds
anything else is refused, so that two datasets never mix.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UNSAFE, Problem, RefusedError, UsageError, shown
from data_tools.files import storage_errors, write_atomic
from data_tools.folder import METADATA, OWN, inside
from data_tools.manifest import NAME
from data_tools.rows import Rows, plain, read_rows
from data_tools.sources import File, Order, choose

MARK = f"{OWN}/import.json"
"""Says what a folder is filled from."""
MAX_NAME_BYTES = 255
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
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def import_pictures(order: Order, output: Path, progress: Callable[[int], None] | None = None) -> Imported:
    """Fill the folder `output` from a source; afterwards it scans and loads like any imagefolder.

    Args:
        order: what to import.
        output: a new or empty folder, or one that the same import has begun.
        progress: called with the number of files done after each one.

    Raises:
        UsageError: the source is not known or cannot be followed, or the folder holds something else.
        DataToolsError: the source is damaged, or refused for safety (exit code 8).
        StorageError: the disk is full or read-only.
    """
    name, source = choose(order.place)
    root = Path(output)
    _claim(root, order, name)
    done = Imported(name, root)
    for item in source.read(order):
        if isinstance(item, Problem):
            done.problems.append(item)
            continue
        try:
            _write(root, item, done)
        except RefusedError as refusal:
            done.problems.append(refusal.problem(item.name))
        if progress is not None:
            progress(done.new + done.kept)
    _write_metadata(root, done)
    return done


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
    if file.columns is not None:
        done.rows.append({"file_name": name, **file.columns})


def _write_metadata(root: Path, done: Imported) -> None:
    """Write metadata.jsonl last; rows that an earlier import wrote, and somebody may have edited, stay."""
    for name in METADATA:
        if (root / OWN / name).exists():
            found = read_rows(root / OWN, name)
            done.problems += found.problems
            done.rows += [plain(row.values) for row in found.rows]
    before = read_rows(root, NAME) if (root / NAME).exists() else Rows(NAME)
    if before.problems:
        done.problems += before.problems
        return
    there = {row.values.get("file_name") for row in before.rows}
    new = [row for row in done.rows if row.get("file_name") not in there]
    if new:
        rows = [*(row.values for row in before.rows), *new]
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        with storage_errors(root / NAME):
            write_atomic(root / NAME, "".join(f"{line}\n" for line in lines).encode())


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
