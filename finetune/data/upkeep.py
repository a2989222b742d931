"""Looking after a cache: what is in it, whether it is whole, and removing what nobody needs, when asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.errors import counted
from finetune.data.cache import KINDS
from finetune.data.store import CLAIMS, DAMAGED, SHARD, DamagedError, read_entry, read_index, shards
from finetune.errors import DataError
from finetune.storage import disk_errors
from finetune.tracking import Reporter, file_size

DAY = 86400.0
LEFTOVER_SECONDS = 3600.0
"""A half-written file this old belongs to a process that was killed."""


@dataclass
class Kind:
    """One folder of a cache.

    Attributes:
        shards: whole ones -> how many entries and bytes each holds.
        unused: those of them that no run has used for the days that were asked about.
        damaged: shards that are not what was written, found now or set aside before.
        leftovers: half-written files of processes that were killed.
        foreign: whatever else lies there; it is named and never touched.
    """

    name: str
    shards: dict[Path, tuple[int, int]] = field(default_factory=dict)
    unused: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)


@dataclass
class Upkeep:
    """What was found in a cache, and what was removed."""

    folder: Path
    kinds: list[Kind]
    removed: list[Path] = field(default_factory=list)
    freed: int = 0

    @property
    def damaged(self) -> list[Path]:
        """All damaged shards."""
        return [path for kind in self.kinds for path in kind.damaged]

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        rows = [(kind.name, _row(kind)) for kind in self.kinds]
        if self.removed:
            rows.append(("removed", f"{counted(len(self.removed), 'file')}, {file_size(self.freed)}"))
        return rows


def find_cache(folder: Path) -> Path:
    """The cache of a run folder, or the folder itself if it is a cache.

    Raises:
        DataError: if it is neither.
    """
    for place in (folder / "cache", folder):
        if any(_is_ours(place / name) for name in KINDS):
            return place
    raise DataError(
        f"{folder} is neither a run folder with a cache nor a cache ({', '.join(KINDS)}); name the run's output_dir, "
        "or its data.cache_folder."
    )


def _is_ours(folder: Path) -> bool:
    """Whether a cache ever wrote here: people have folders called `text` and `masks` too."""
    return (folder / CLAIMS).is_file() or bool(shards(folder))


def inspect_cache(folder: Path, reporter: Reporter, *, read: bool = True, unused_days: float | None = None) -> Upkeep:
    """Look at every shard of a cache; nothing is changed.

    Args:
        folder: a run folder or a cache.
        reporter: told how far it is.
        read: compare every entry with its checksum, at the speed of the disk; else only look at the headers.
        unused_days: also name shards that no run has used for so many days.
    """
    place = find_cache(folder)
    kinds = [Kind(name) for name in KINDS if _is_ours(place / name)]
    every = [(kind, path) for kind in kinds for path in shards(place / kind.name)]
    with reporter.progress("Reading the cache", len(every)) as advance:
        for done, (kind, path) in enumerate(every, start=1):
            _look_at(kind, path, read, unused_days)
            advance(done, "")
    for kind in kinds:
        _look_around(kind, place / kind.name)
    return Upkeep(place, kinds)


def prune_cache(found: Upkeep) -> Upkeep:
    """Remove what `inspect_cache` found to be of no use: damaged, half-written and, if asked, unused files.

    A run that is using the cache right now keeps what it reads: shards count as used from its start on.

    Raises:
        StorageError: if the folder cannot be written.
    """
    with disk_errors(found.folder):
        for kind in found.kinds:
            for path in [*kind.damaged, *kind.leftovers, *kind.unused]:
                if path.exists():
                    found.freed += path.stat().st_size
                    path.unlink()
                    found.removed.append(path)
                kind.shards.pop(path, None)
            kind.damaged, kind.leftovers, kind.unused = [], [], []
    return found


def _look_at(kind: Kind, path: Path, read: bool, unused_days: float | None) -> None:
    try:
        status = path.stat()
        entries = read_index(path)
        for entry in entries.values() if read else ():
            read_entry(path, entry)
    except FileNotFoundError:
        return
    except DamagedError:
        kind.damaged.append(path)
        return
    kind.shards[path] = len(entries), status.st_size
    if unused_days is not None and time.time() - status.st_mtime > unused_days * DAY:
        kind.unused.append(path)


def _look_around(kind: Kind, folder: Path) -> None:
    """Sort everything that is no shard."""
    for path in _files(folder):
        if path.name.endswith(DAMAGED) and SHARD.fullmatch(path.name.removesuffix(DAMAGED)):
            kind.damaged.append(path)
        elif path.name.startswith(".shard-") and ".part-" in path.name:
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                kind.leftovers.append(path)
        elif path.name != CLAIMS and not SHARD.fullmatch(path.name):
            kind.foreign.append(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _row(kind: Kind) -> str:
    entries, size = (sum(held[i] for held in kind.shards.values()) for i in (0, 1))
    parts = [f"{counted(entries, 'entry', 'entries')} in {counted(len(kind.shards), 'shard')}, {file_size(size)}"]
    for count, what in (
        (len(kind.damaged), "damaged"),
        (len(kind.leftovers), "half-written by a killed process"),
        (len(kind.foreign), "not of the cache, left alone"),
        (len(kind.unused), "unused"),
    ):
        parts += [f"{count:,} {what}"] if count else []
    return "; ".join(parts)
