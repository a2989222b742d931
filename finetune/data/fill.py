"""Filling a store: what is missing is loaded by threads, made in batches, and written in shards, by any number of
processes at once.

The wanted entries are cut into pieces of work in an order that depends on the entries only, so that every process that
wants the same ones sees the same pieces. A process claims a piece, makes what is missing of it, and writes it; pieces
that others hold are looked at again until they are there, or their holder died and they are ours.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from data_tools.shelves import NamedShelf
from finetune.data.store import Store, Tensors
from finetune.devices import out_of_memory
from finetune.errors import ResourceError, StorageError
from finetune.tracking import file_size

PIECE = 256
"""Entries per piece of work, and at most per shard."""
SHARD_BYTES = 64 * 2**20
"""A shard is written when it has grown to this."""
SHARD_SECONDS = 30.0
"""A shard is written after this time at the latest: a kill costs no more work than that."""
PATIENCE = 600.0
"""Seconds without news from the holder of a piece, after which it is made here as well."""
POLL = 0.2
DISK_RESERVE = 64 * 2**20
"""Bytes that are left free."""

T = TypeVar("T")
L = TypeVar("L")
Progress = Callable[[int, int], None]
"""Called with (done, total)."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe(Generic[T, L]):
    """How entries of one kind come about.

    Attributes:
        what: the kind, for messages: "pictures".
        key: an item's content key, hex digits.
        group: items with equal groups may be made together.
        load: what is slow and needs no accelerator, such as decoding; called by threads.
        make: the tensors of a batch of loaded items of one group.
    """

    what: str
    key: Callable[[T], str]
    group: Callable[[T], Hashable]
    load: Callable[[T], L]
    make: Callable[[Sequence[T], Sequence[L]], list[Tensors]]


def fill(
    store: Store, items: Sequence[T], recipe: Recipe[T, L], batch_size: int,
    *, progress: Progress | None = None, say: Say | None = None,
) -> int:  # fmt: skip
    """Make every entry that is not there yet; how many were made here.

    Raises:
        StorageError: if they would not fit on the disk, before any is written.
        ResourceError: if even one at a time does not fit into memory.
    """
    wanted: NamedShelf[int] = NamedShelf()
    for place, item in enumerate(items):
        wanted[recipe.key(item)] = place
    store.want(wanted)
    work = _Work(store, items, wanted, recipe, batch_size, progress or _silent, say or _mute)
    work.run()
    store.touch()
    return work.made


class _Pieces:
    """Keys in pieces, like beside like, the same for every process that wants the same entries."""

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        """Order (key, group) pairs by group, then by key."""
        met: dict[str, int] = {}
        groups = array("q")

        def noted() -> Iterator[bytes]:
            for key, group in keys:
                groups.append(met.setdefault(group, len(met)))
                yield key.encode()

        names = np.fromiter(noted(), dtype="S40")
        rank = np.argsort(np.argsort(list(met)))
        self._names = names[np.lexsort((names, rank[np.asarray(groups)]))]

    def __len__(self) -> int:
        return (len(self._names) + PIECE - 1) // PIECE

    def __getitem__(self, number: int) -> list[str]:
        return [name.decode() for name in self._names[number * PIECE : (number + 1) * PIECE].tolist()]


class _Work(Generic[T, L]):
    """One call of `fill`."""

    def __init__(
        self, store: Store, items: Sequence[T], wanted: NamedShelf[int], recipe: Recipe[T, L], batch_size: int,
        progress: Progress, say: Say,
    ) -> None:  # fmt: skip
        self.made = 0
        self._store, self._items, self._wanted, self._recipe = store, items, wanted, recipe
        self._batch_size = batch_size
        self._progress, self._say = progress, say
        self._checked_disk = False
        self._total = len(wanted)
        self._left = len(store.missing(wanted))

    def run(self) -> None:
        """Until every piece is there, made here or by others."""
        self._tell()
        if not self._left:
            return
        pieces = _Pieces((key, str(self._recipe.group(self._item(key)))) for key in self._wanted)
        lacking = {number: len(self._store.missing(pieces[number])) for number in range(len(pieces))}
        news = time.monotonic()
        while lacking := {number: count for number, count in lacking.items() if count}:
            before = self._left
            forced = time.monotonic() - news > PATIENCE
            for number in lacking:
                piece = pieces[number]
                name = hashlib.sha256("\n".join(piece).encode()).hexdigest()
                with self._store.claim(name) as ours:
                    self._store.refresh()
                    if ours or forced:
                        self._make(self._store.missing(piece))
                lacking[number] = len(self._store.missing(piece))
                self._left = sum(lacking.values())
                self._tell()
            if self._left < before:
                news = time.monotonic()
            elif self._left:
                time.sleep(POLL)

    def _item(self, key: str) -> T:
        return self._items[self._wanted[key]]

    def _tell(self) -> None:
        self._progress(self._total - self._left, self._total)

    def _make(self, keys: list[str]) -> None:
        pending: dict[str, Tensors] = {}
        size, since = 0, time.monotonic()
        for batch in self._batches(keys):
            made = self._tensors(batch)
            self._check_disk(made)
            pending |= made
            self._left -= len(made)
            self.made += len(made)
            self._tell()
            size += _size(made)
            if size >= SHARD_BYTES or time.monotonic() - since >= SHARD_SECONDS:
                self._store.add(pending)
                pending, size, since = {}, 0, time.monotonic()
        if pending:
            self._store.add(pending)

    def _batches(self, keys: list[str]) -> Iterator[list[tuple[str, L]]]:
        """Loaded items, in batches of one group; the next ones are loaded meanwhile."""
        batch: list[tuple[str, L]] = []
        last: Hashable = None
        for key, loaded in _ahead(keys, lambda key: self._recipe.load(self._item(key)), 2 * self._batch_size):
            group = self._recipe.group(self._item(key))
            if batch and (len(batch) >= self._batch_size or group != last):
                yield batch
                batch = []
            batch.append((key, loaded))
            last = group
        if batch:
            yield batch

    def _tensors(self, batch: list[tuple[str, L]]) -> dict[str, Tensors]:
        """The batch made; in halves where memory does not suffice, which then holds for all that follow."""
        keys = [key for key, _ in batch]
        try:
            made = self._recipe.make([self._item(key) for key in keys], [loaded for _, loaded in batch])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    f"Memory does not suffice to encode even one of the {self._recipe.what}.",
                    [str(error).splitlines()[0] if str(error) else "out of memory",
                     "lower data.resolution, or free memory that other programs hold"],
                ) from None  # fmt: skip
            made = None
        if made is not None:
            return dict(zip(keys, made, strict=True))
        # keep: outside of the handler, whose traceback would hold the tensors that did not fit.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._batch_size = max(1, len(batch) // 2)
        self._say(f"memory does not suffice for {len(batch)} {self._recipe.what} at once; going on with "
                  f"{self._batch_size} at once")  # fmt: skip
        middle = self._batch_size
        return self._tensors(batch[:middle]) | self._tensors(batch[middle:])

    def _check_disk(self, made: dict[str, Tensors]) -> None:
        """Whether all that is missing fits, judged by the first batch and before anything is written."""
        if self._checked_disk:
            return
        self._checked_disk = True
        needed = _size(made) // len(made) * self._left
        free = shutil.disk_usage(_existing(self._store.folder)).free
        if needed + DISK_RESERVE > free:
            raise StorageError(
                f"The encoded {self._recipe.what} need about {file_size(needed)} in {self._store.folder}, and "
                f"{file_size(free)} are free, of which {file_size(DISK_RESERVE)} are kept for checkpoints and logs.",
                ["free some space, name another data.cache_folder, or look at `finetune cache FOLDER --check`"],
            )


def _ahead(keys: Sequence[str], load: Callable[[str], L], count: int) -> Iterator[tuple[str, L]]:
    """Every key with what was loaded for it, in order, while threads load the next `count`."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    waiting: deque[tuple[str, Future[L]]] = deque()
    try:
        for key in keys:
            waiting.append((key, pool.submit(load, key)))
            if len(waiting) > count:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        # keep: cancel, or an error or Ctrl-C would first load the rest.
        pool.shutdown(wait=True, cancel_futures=True)


def _size(entries: dict[str, Tensors]) -> int:
    return sum(tensor.nbytes for parts in entries.values() for tensor in parts.values())


def _existing(folder: Path) -> Path:
    return next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())


def _silent(done: int, total: int) -> None:
    """Show no progress."""


def _mute(text: str) -> None:
    """Say nothing."""
