"""Lists and tables that lie in a temporary file, so that a folder of a million pictures does not lie in memory.

What is kept costs 8 bytes of memory each, and 8 more where it is looked up by name. The file has no name, so that
nothing is left of it however the process ends; the first `BLOCK` bytes need none. Worker processes may read what was
there when they were started.
"""

from __future__ import annotations

import marshal
import os
import tempfile
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import fields
from itertools import islice, pairwise
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from data_tools.files import storage_errors

T = TypeVar("T")
BLOCK = 2**18
"""Bytes that are written at once."""
AT_ONCE = 512
"""Things that are read at once when all of them are wanted."""
MASK = 2**32 - 1
UNSORTED = 4096
"""Newest keys of an index that are not sorted in yet."""


class Shelf(Sequence[T]):
    """A list that grows at its end; its things are made anew each time they are asked for.

    Args:
        things: the first ones.
        pack: makes plain values (numbers, texts, None, tuples, lists, dicts) of a thing; as it is, if None.
        unpack: the way back.

    Raises:
        StorageError: the disk is full.
    """

    def __init__(
        self,
        things: Iterable[T] = (),
        pack: Callable[[T], Any] | None = None,
        unpack: Callable[[Any], T] | None = None,
    ) -> None:
        self._pack, self._unpack = pack, unpack
        self._ends = array("q", [0])
        self._fresh = bytearray()
        self._written = 0
        self._file: IO[bytes] | None = None
        self._reading = threading.Lock()
        self.extend(things)

    def append(self, thing: T) -> None:
        """Put it at the end."""
        # keep: not JSON, which takes three times as long; only this process and its workers ever read the file.
        data = marshal.dumps(thing if self._pack is None else self._pack(thing))  # type: ignore[arg-type]
        self._fresh += data
        self._ends.append(self._ends[-1] + len(data))
        if len(self._fresh) >= BLOCK:
            self._write()

    def extend(self, things: Iterable[T]) -> None:
        """Put them at the end."""
        for thing in things:
            self.append(thing)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        start = place + len(self) if place < 0 else place
        if not 0 <= start < len(self):
            raise IndexError(place)
        value: T = marshal.loads(self._bytes(self._ends[start], self._ends[start + 1]))
        return value if self._unpack is None else self._unpack(value)

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._between(start, min(len(self), start + AT_ONCE))

    def at(self, places: Sequence[int]) -> list[T | None]:
        """The things at some places, None for -1; quick where they follow one another."""
        first, count = (places[0], len(places)) if places else (0, 0)
        if first >= 0 and count and places == list(range(first, first + count)):
            return [*self._between(first, first + count)]
        return [None if place < 0 else self[place] for place in places]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _between(self, start: int, stop: int) -> list[T]:
        ends = self._ends[start : stop + 1]
        data = memoryview(self._bytes(ends[0], ends[-1]))
        values = [marshal.loads(data[a - ends[0] : b - ends[0]]) for a, b in pairwise(ends)]
        return values if self._unpack is None else [self._unpack(value) for value in values]

    def _bytes(self, start: int, stop: int) -> bytes | bytearray:
        if start >= self._written or self._file is None:
            return self._fresh[start - self._written : stop - self._written]
        fresh, length = self._fresh[: max(0, stop - self._written)], min(stop, self._written) - start
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), length, start) + fresh
        with self._reading:
            self._file.seek(start)
            return self._file.read(length) + fresh

    def _write(self) -> None:
        with storage_errors(Path(tempfile.gettempdir())), self._reading:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="finetune-")  # noqa: SIM115 - closed with the shelf
            self._file.seek(self._written)
            self._file.write(self._fresh)
            self._file.flush()
        self._written += len(self._fresh)
        self._fresh = bytearray()


Packing = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""Makes plain values of a thing, and the way back."""


def packing(kind: type[Any], **parts: Packing) -> Packing:
    """Of a dataclass: a tuple of its fields, which are plain values or None, or are named in `parts`."""
    names = [field.name for field in fields(kind)]
    values_of = attrgetter(*names)
    places = [(names.index(name), *how) for name, how in parts.items()]

    def pack(thing: Any) -> tuple[Any, ...]:
        values = values_of(thing)
        for place, inner, _ in places:
            if values[place] is not None:
                values = (*values[:place], inner(values[place]), *values[place + 1 :])
        return values

    def unpack(values: Any) -> Any:
        for place, _, inner in places:
            if values[place] is not None:
                values = (*values[:place], inner(values[place]), *values[place + 1 :])
        return kind(*values)

    return pack, unpack


class Index:
    """Where keys stand in the order in which they were added, in 8 bytes each.

    Of every key 32 bits are kept. Some keys share them, so the places it names are candidates, to be looked at.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        hashes = np.frombuffer(array("q", map(hash, keys)) or b"", dtype=np.int64).astype(np.uint32)
        order = np.argsort(hashes, kind="stable")
        self._count = len(hashes)
        # keep: in one, so that a thread which looks while another one sorts sees all of it before, or all after.
        self._parts: _Parts = (array("I", hashes[order].tobytes()), array("I", order.astype(np.uint32).tobytes()), {})

    def add(self, key: str) -> None:
        """The next key."""
        newest = self._parts[2]
        newest.setdefault(hash(key) & MASK, []).append(self._count)
        self._count += 1
        if len(newest) >= UNSORTED:
            self._sorted()

    def places(self, key: str) -> list[int]:
        """Where the key may stand, first place first."""
        hashes, places, newest = self._parts
        wanted = hash(key) & MASK
        low = bisect_left(hashes, wanted)
        return places[low : bisect_right(hashes, wanted, low)].tolist() + newest.get(wanted, [])

    def newest(self, keys: Sequence[str]) -> list[int]:
        """The last place where each of many keys may stand; -1 for one that stands nowhere."""
        hashes, places, newest = self._parts
        wanted = np.fromiter(map(hash, keys), np.int64, len(keys)).astype(np.uint32)
        found = [-1] * len(keys)
        if hashes:
            last = np.searchsorted(_numbers(hashes), wanted, side="right") - 1
            there = _numbers(hashes)[last] == wanted
            found = np.where(there, _numbers(places)[last].astype(np.int64), -1).tolist()
        if newest:
            pairs = zip(wanted.tolist(), found, strict=True)
            found = [newest[key][-1] if key in newest else place for key, place in pairs]
        return found

    def __len__(self) -> int:
        """About how many different keys there are."""
        hashes = _numbers(self._sorted()[0])
        return min(1, len(hashes)) + int((hashes[1:] != hashes[:-1]).sum())

    def repeated(self) -> list[int]:
        """Every place whose key may stand elsewhere as well, in order."""
        hashes, places = map(_numbers, self._sorted()[:2])
        same = np.zeros(len(hashes) + 1, dtype=bool)
        same[1:-1] = hashes[1:] == hashes[:-1]
        return sorted(places[same[1:] | same[:-1]].tolist())

    def _sorted(self) -> _Parts:
        hashes, places, newest = self._parts
        if newest:
            fresh = array("I", (key for key, where in newest.items() for _ in where))
            fresh_places = array("I", (place for where in newest.values() for place in where))
            every = np.concatenate([_numbers(hashes), _numbers(fresh)])
            where = np.concatenate([_numbers(places), _numbers(fresh_places)])
            order = np.argsort(every, kind="stable")
            self._parts = (array("I", every[order].tobytes()), array("I", where[order].tobytes()), {})
        return self._parts


_Parts = tuple["array[int]", "array[int]", dict[int, list[int]]]


def _numbers(values: array[int]) -> NDArray[np.uint32]:
    return np.frombuffer(values or b"", dtype=np.uint32)


class Lookup(Generic[T]):
    """Finds the things of a list by a key of theirs."""

    def __init__(self, things: Sequence[T], key: Callable[[T], str]) -> None:
        self._things, self._key = things, key
        self._index = Index(map(key, things))

    def __call__(self, key: str) -> list[T]:
        """All things with this key, in order."""
        found = [self._things[place] for place in self._index.places(key)]
        return [thing for thing in found if self._key(thing) == key]


class NamedShelf(MutableMapping[str, T]):
    """A table that lies in a temporary file; `pack` and `unpack` as for `Shelf`."""

    def __init__(self, pack: Callable[[T], Any] | None = None, unpack: Callable[[Any], T] | None = None) -> None:
        self._rows: Shelf[tuple[Any, ...]] = Shelf()
        self._index = Index()
        self._pack, self._unpack = pack, unpack

    def __setitem__(self, name: str, thing: T) -> None:
        self._append(name, thing if self._pack is None else self._pack(thing))

    def __getitem__(self, name: str) -> T:
        _, row = self._row(name)
        if len(row) < 2:
            raise KeyError(name)
        return self._thing(row)

    def nth(self, place: int) -> T:
        """What was put there as the n-th, counted from 0."""
        return self._thing(self._rows[place])

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._append(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and len(self._row(name)[1]) == 2

    def __iter__(self) -> Iterator[str]:
        return (row[0] for row in self._living())

    def each(self) -> Iterator[tuple[str, T]]:
        """As `items()`, in one go through the file."""
        return ((row[0], self._thing(row)) for row in self._living())

    def __len__(self) -> int:
        return sum(1 for _ in self._living())

    def about(self) -> int:
        """How many names there are, those that were taken out included; quicker than `len`."""
        return len(self._index)

    def gather(self, names: Iterable[str]) -> Iterator[tuple[str, T | None]]:
        """Many names, each with what is there, or None; quick where they come in the order of the table."""
        left = iter(names)
        while part := list(islice(left, AT_ONCE)):
            for name, row in zip(part, self._rows.at(self._index.newest(part)), strict=True):
                found = row if row is None or row[0] == name else self._row(name)[1]
                yield name, self._thing(found) if found is not None and len(found) == 2 else None

    def _thing(self, row: tuple[Any, ...]) -> T:
        thing: T = row[1] if self._unpack is None else self._unpack(row[1])
        return thing

    def _living(self) -> Iterator[tuple[Any, ...]]:
        doubtful = set(self._index.repeated())
        for place, row in enumerate(self._rows):
            if len(row) == 2 and (place not in doubtful or self._row(row[0])[0] == place):
                yield row

    def _append(self, *row: Any) -> None:
        self._index.add(row[0])
        self._rows.append(row)

    def _row(self, name: str) -> tuple[int, tuple[Any, ...]]:
        """The newest row of this name, and its place; an empty one where there is none."""
        for place in reversed(self._index.places(name)):
            row = self._rows[place]
            if row[0] == name:
                return place, row
        return -1, ()


def distinct(texts: Iterable[str]) -> Iterator[str]:
    """Each of them once, where it comes first."""
    met = NamedShelf[bool]()
    left = iter(texts)
    while part := list(islice(left, AT_ONCE)):
        for text in [text for text, known in met.gather(dict.fromkeys(part)) if not known]:
            met[text] = True
            yield text
