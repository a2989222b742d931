"""Looking at every picture of a folder: on all cores, in several processes, and only once while it stays the same."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular
from data_tools.fingerprints import phash, pixel_sha256, sha256
from data_tools.folder import Listing
from data_tools.images import MAX_FILE_BYTES, MIN_SIDE, WHITE, Color, decode
from data_tools.memory import Entry, Memory, Outcome
from data_tools.pool import death, in_workers
from data_tools.processes import wait_for_others
from data_tools.records import ImageRecord

Progress = Callable[[int, int], None]
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


@dataclass
class Seen:
    """Records without captions, and what is wrong or odd, in listing order."""

    records: dict[str, ImageRecord] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    decoded: int = 0
    """Pictures that were looked at now; the others were known."""


def inspect_all(listing: Listing, looking: Looking) -> Seen:
    """Look at all pictures and masks; with a memory of several processes, at this one's share, then at the rest.

    Raises:
        StorageError: the memory's disk is full.
    """
    names = _names(listing)
    found: dict[str, Outcome] = {}
    memory = looking.memory
    missing = _recall(listing.root, names, memory, found)
    advance = _counter(looking.progress, len(names), len(found))
    mine = missing if memory is None else memory.share.of(missing)
    for name, outcome in _look(listing.root, mine, looking):
        found[name] = outcome
        advance()
    others = [name for name in missing if name not in found]
    if others:
        _collect(listing.root, others, looking, found, advance)
    return _seen(names, found, len(mine))


def inspect_share(listing: Listing, looking: Looking) -> Seen:
    """Look at this process's share, and leave what was seen in the memory for the process that puts all together."""
    assert looking.memory is not None, "what is seen travels through the memory"
    names = looking.memory.share.of(_names(listing))
    found: dict[str, Outcome] = {}
    missing = _recall(listing.root, names, looking.memory, found)
    found.update(_look(listing.root, missing, looking))
    return _seen(names, found, len(missing))


def _names(listing: Listing) -> list[str]:
    return [*listing.pictures, *dict.fromkeys(listing.masks.values())]


def _seen(names: Sequence[str], found: dict[str, Outcome], decoded: int) -> Seen:
    seen = Seen(decoded=decoded)
    for name in names:
        outcome = found[name]
        if isinstance(outcome, Problem):
            seen.problems.append(outcome)
        else:
            seen.records[name] = outcome
            seen.problems.extend(_odd_shape(outcome))
    return seen


def _counter(progress: Progress | None, total: int, known: int) -> Callable[[], None]:
    done = itertools.count(known + 1)
    if progress is None:
        return lambda: None
    if known:
        progress(known, total)
    return lambda: progress(next(done), total)


def _recall(root: Path, names: Sequence[str], memory: Memory | None, found: dict[str, Outcome]) -> list[str]:
    """Fill `found` with what the memory knows of untouched files; the names that remain."""
    if memory is None:
        return list(names)
    missing = []
    # keep: not `root / name`, which takes longer than the question itself.
    start = os.path.join(root, "")
    for name in names:
        try:
            outcome = memory.recall(name, os.stat(start + name)) if name in memory.entries else None
        except OSError:
            outcome = None
        if outcome is None:
            missing.append(name)
        else:
            found[name] = outcome
    return missing


def _collect(
    root: Path, others: list[str], looking: Looking, found: dict[str, Outcome], advance: Callable[[], None]
) -> None:
    """Take what the other processes find; when none of them gives news any more, look at the rest here."""
    memory = looking.memory
    assert memory is not None, "there are other processes only with a memory"
    wait_for_others(others, lambda name: memory.knows(name, os.stat(root / name)), memory.refresh)
    # keep: through the ordinary way, which reads again what had only just been written, and decodes the rest.
    rest = _recall(root, others, memory, found)
    for _ in range(len(others) - len(rest)):
        advance()
    for name, outcome in _look(root, rest, looking):
        found[name] = outcome
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
    except OSError:
        data, status = b"", None
    except RefusedError as refusal:
        return refusal.problem(name), None
    digest = sha256(data)
    outcome = memory.recall_bytes(name, digest) if memory is not None else None
    if outcome is None:
        outcome = _decoded(name, data, digest, background)
    return outcome, None if status is None else Entry.of(name, status, read_at, digest, outcome)


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
