"""Looking at every picture of a folder: in threads, in several processes, and only once while it stays the same."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular
from data_tools.fingerprints import phash, pixel_sha256, sha256
from data_tools.folder import Listing
from data_tools.images import MAX_FILE_BYTES, MIN_SIDE, WHITE, Color, decode
from data_tools.memory import Memory, Outcome
from data_tools.records import ImageRecord

Progress = Callable[[int, int], None]
MAX_ASPECT = 4.0
"""Long side over short side; above this most buckets crop much of the picture away."""
PATIENCE = 60.0
"""Seconds without any news from the other processes, after which their share is done here."""
POLL = 0.2
"""Seconds between two looks at what the other processes have found."""


@dataclass(frozen=True)
class Looking:
    """How pictures are looked at."""

    background: Color = WHITE
    """Shown where a picture is transparent."""
    workers: int | None = None
    """Threads that decode; None means one per CPU core, at most 8 (each may hold a 64 MP picture)."""
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
    names = [*listing.pictures, *dict.fromkeys(listing.masks.values())]
    found: dict[str, Outcome] = {}
    missing = _recall(listing.root, names, looking.memory, found)
    advance = _counter(looking.progress, len(names), len(found))
    mine = _mine(names, missing, looking.memory)
    seen = Seen(decoded=len(mine))
    for name, outcome in _look(listing.root, mine, looking):
        found[name] = outcome
        advance()
    if len(mine) < len(missing):
        _collect(listing.root, [name for name in missing if name not in found], looking, found, advance)
    for name in names:
        outcome = found[name]
        if isinstance(outcome, Problem):
            seen.problems.append(outcome)
        else:
            seen.records[name] = outcome
            seen.problems.extend(_odd_shape(outcome))
    return seen


def inspect_share(listing: Listing, looking: Looking) -> int:
    """Look at this process's share and leave the outcomes in the memory; how many pictures it was."""
    assert looking.memory is not None, "outcomes travel through the memory"
    names = [*listing.pictures, *dict.fromkeys(listing.masks.values())]
    mine = _mine(names, _recall(listing.root, names, looking.memory, {}), looking.memory)
    return sum(1 for _ in _look(listing.root, mine, looking))


def _mine(names: Sequence[str], missing: list[str], memory: Memory | None) -> list[str]:
    """This process's share of what is missing: counted over all names, because the others miss other ones."""
    if memory is None or memory.share.count == 1:
        return missing
    share = set(memory.share.of(names))
    return [name for name in missing if name in share]


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
    waiting = list(others)
    news = time.monotonic()
    while waiting and time.monotonic() - news < PATIENCE:
        if memory.refresh():
            news = time.monotonic()
        still = [name for name in waiting if not memory.knows(name, os.stat(root / name))]
        if len(still) == len(waiting):
            time.sleep(POLL)
        waiting = still
    # keep: through the ordinary way, which reads again what had only just been written, and decodes the rest.
    rest = _recall(root, others, memory, found)
    for _ in range(len(others) - len(rest)):
        advance()
    for name, outcome in _look(root, rest, looking):
        found[name] = outcome
        advance()


def _look(root: Path, names: Iterable[str], looking: Looking) -> Iterator[tuple[str, Outcome]]:
    """Decode in threads (Pillow and hashlib release the interpreter lock), in order, a few pictures ahead."""
    workers = looking.workers or min(8, os.cpu_count() or 1)
    look = partial(_look_at, root, background=looking.background, memory=looking.memory)
    # keep: a few ahead only, so that a folder of a million pictures is not a million waiting tasks.
    ahead: list[tuple[str, Future[Outcome]]] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for name in names:
            ahead.append((name, pool.submit(look, name)))
            if len(ahead) > 4 * workers:
                first, future = ahead.pop(0)
                yield first, future.result()
        for name, future in ahead:
            yield name, future.result()
    finally:
        # keep: cancel, or Ctrl-C would first decode what is waiting.
        pool.shutdown(wait=True, cancel_futures=True)


def _look_at(root: Path, name: str, *, background: Color, memory: Memory | None) -> Outcome:
    """One picture: its record without captions, or why it cannot be used."""
    path = root / name
    try:
        # keep: the times before the bytes, so that a change in between shows the next time.
        status = os.stat(path) if memory is not None else None
        # keep: one read, so that the digest is of the very bytes that were decoded.
        data = read_regular(path, MAX_FILE_BYTES)
    except OSError:
        data, status = b"", None
    except RefusedError as refusal:
        return refusal.problem(name)
    digest = sha256(data)
    outcome = memory.recall_bytes(name, digest) if memory is not None else None
    if outcome is None:
        outcome = _decoded(name, data, digest, background)
    if memory is not None and status is not None:
        memory.keep(name, status, digest, outcome)
    return outcome


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
