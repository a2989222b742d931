"""Looking at every picture of a folder: on all cores, in several processes, and only once while it stays the same."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular, unread
from data_tools.fingerprints import phash, pixel_sha256, sha256
from data_tools.folder import Listing
from data_tools.images import MAX_FILE_BYTES, MIN_SIDE, WHITE, Color, decode
from data_tools.memory import Entry, Memory, Outcome
from data_tools.pool import death, in_workers
from data_tools.processes import wait_for_others
from data_tools.records import RECORD, ImageRecord
from data_tools.shelves import NamedShelf, Shelf, packing

Progress = Callable[[int, int], None]
PROBLEM, PROBLEM_FIELDS = packing(Problem), len(fields(Problem))
MAX_ASPECT = 4.0
"""Long side over short side; above this most buckets crop much of the picture away."""


@dataclass(frozen=True)
class Looking:
    """How pictures are looked at."""

    background: Color = WHITE
    """Shown where a picture is transparent."""
    workers: int | None = None
    """How many decode at once; None: see `pool.count_of`."""
    progress: Progress | None = None
    """Called as (done, total), from the calling thread."""
    memory: Memory | None = None
    """What earlier scans saw; None looks at everything."""


def _pack(outcome: Outcome) -> Any:
    return PROBLEM[0](outcome) if isinstance(outcome, Problem) else RECORD[0](outcome)


def _unpack(values: Any) -> Outcome:
    outcome: Outcome = PROBLEM[1](values) if len(values) == PROBLEM_FIELDS else RECORD[1](values)
    return outcome


@dataclass
class Seen:
    """What was seen of pictures: records without captions, and what is wrong or odd."""

    names: Sequence[str]
    """Of all pictures and masks, in listing order."""
    found: NamedShelf[Outcome] = field(default_factory=lambda: NamedShelf(_pack, _unpack))
    problems: list[Problem] = field(default_factory=list)
    decoded: int = 0
    """Pictures that were looked at now; the others were known."""

    def add(self, name: str, outcome: Outcome) -> None:
        """What was seen of one of them."""
        self.found[name] = outcome
        self.problems.extend([outcome] if isinstance(outcome, Problem) else _odd_shape(outcome))

    def record(self, name: str) -> ImageRecord | None:
        """The record of a picture; None where there is none that can be used."""
        outcome = self.found.get(name)
        return outcome if isinstance(outcome, ImageRecord) else None

    def records(self) -> Iterator[ImageRecord]:
        """All of them, in listing order."""
        return (outcome for _, outcome in self.found.gather(self.names) if isinstance(outcome, ImageRecord))


def inspect_all(listing: Listing, looking: Looking) -> Seen:
    """Look at all pictures and masks; with a memory of several processes, at this one's share, then at the rest.

    Raises:
        StorageError: the memory's disk is full.
    """
    seen = Seen(_names(listing))
    memory = looking.memory
    missing = Shelf(_recall(listing.root, seen.names, memory, seen))
    advance = _counter(looking.progress, len(seen.names), len(seen.names) - len(missing))
    alone = memory is None or memory.share.count == 1
    mine = missing if alone or memory is None else memory.share.of(missing)
    for name, outcome in _look(listing.root, mine, looking):
        seen.add(name, outcome)
        advance()
    if not alone:
        _collect(listing.root, [name for name in missing if name not in seen.found], looking, seen, advance)
    return replace(seen, decoded=len(mine))


def inspect_share(listing: Listing, looking: Looking) -> Seen:
    """Look at this process's share, and leave what was seen in the memory for the process that puts all together."""
    assert looking.memory is not None, "what is seen travels through the memory"
    seen = Seen(looking.memory.share.of(_names(listing)))
    missing = list(_recall(listing.root, seen.names, looking.memory, seen))
    for name, outcome in _look(listing.root, missing, looking):
        seen.add(name, outcome)
    return replace(seen, decoded=len(missing))


def _names(listing: Listing) -> Sequence[str]:
    masks = dict.fromkeys(listing.masks.values())
    return Shelf([*listing.pictures, *masks]) if masks else listing.pictures


def _counter(progress: Progress | None, total: int, known: int) -> Callable[[], None]:
    done = itertools.count(known + 1)
    if progress is None:
        return lambda: None
    if known:
        progress(known, total)
    return lambda: progress(next(done), total)


def _recall(root: Path, names: Iterable[str], memory: Memory | None, seen: Seen) -> Iterator[str]:
    """Add what the memory knows of untouched files; the names that remain."""
    # keep: not `root / name`, which takes longer than the question itself.
    start = os.path.join(root, "")
    known = NamedShelf[Entry]() if memory is None else memory.entries
    for name, entry in known.gather(names):
        try:
            outcome = None if entry is None else entry.outcome(os.stat(start + name))
        except OSError:
            outcome = None
        if outcome is None:
            yield name
        else:
            seen.add(name, outcome)


def _collect(root: Path, others: list[str], looking: Looking, seen: Seen, advance: Callable[[], None]) -> None:
    """Take what the other processes find; when none of them gives news any more, look at the rest here."""
    memory = looking.memory
    assert memory is not None, "there are other processes only with a memory"
    wait_for_others(others, lambda name: memory.knows(name, os.stat(root / name)), memory.refresh)
    # keep: through the ordinary way, which reads again what had only just been written, and decodes the rest.
    rest = list(_recall(root, others, memory, seen))
    for _ in range(len(others) - len(rest)):
        advance()
    for name, outcome in _look(root, rest, looking):
        seen.add(name, outcome)
        advance()


def _look(root: Path, names: Sequence[str], looking: Looking) -> Iterator[tuple[str, Outcome]]:
    """Decode on all cores; what is seen is remembered as it comes."""
    memory = looking.memory
    look = partial(_look_at, root, background=looking.background, memory=memory)
    # keep: a death is not remembered, because more memory or another decoder may cope.
    seen = in_workers(look, names, looking.workers, lambda name, code: (death(name, code), None))
    for name, (outcome, entry) in zip(names, seen, strict=True):
        if memory is not None and entry is not None:
            memory.keep(entry)
        yield name, outcome


def _look_at(root: Path, name: str, *, background: Color, memory: Memory | None) -> tuple[Outcome, Entry | None]:
    """One picture: its record without captions, or why it cannot be used; and what is to be remembered."""
    path = root / name
    try:
        # keep: the times before the bytes, so that a change in between shows the next time.
        read_at, status = time.time_ns(), os.stat(path)
        # keep: one read, so that the digest is of the very bytes that were decoded.
        data = read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        return unread(error).problem(name), None
    except RefusedError as refusal:
        return refusal.problem(name), None
    digest = sha256(data)
    outcome = memory.recall_bytes(name, digest) if memory is not None else None
    if outcome is None:
        outcome = _decoded(name, data, digest, background)
    return outcome, Entry.of(name, status, read_at, digest, outcome)


def _decoded(name: str, data: bytes, digest: str, background: Color) -> Outcome:
    try:
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
        sha256=digest,
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
