"""Named tensors under content keys, on disk in shards: the ground that the caches stand on.

A shard is an immutable safetensors file of many entries, written beside its name, fsynced and renamed: a kill at any
moment leaves whole shards and nothing else that is read. Its tensors are called `key/name`; its metadata hold a
checksum per entry, which is compared on every read from disk. Any number of processes may write into one folder: a
shard's name follows from its content, and byte locks in one file (`.claims`) keep two processes from the same piece of
work. Nothing is ever deleted here; a damaged shard is set aside under the ending `.damaged`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.shelves import NamedShelf, Packing
from finetune.errors import DataError
from finetune.storage import DTYPE_NAMES, tensor_bytes, write_safetensors

FORMAT = "finetune cache 2"
"""In every shard's metadata; files without it belong to an older version or to somebody else."""
SHARDS = "shard-*.safetensors"
SHARD = re.compile(r"shard-[0-9a-f]{32}\.safetensors")
DAMAGED = ".damaged"
CLAIMS = ".claims"
RESIDENT_BYTES = 2**30
"""What a store keeps in memory after reading; more than that is read from disk each time."""
INDEXED_AT_ONCE = 32
"""Shards whose entries are looked through together."""
MAX_HEADER_BYTES = 100 * 2**20
_DTYPES = {name: getattr(torch, dtype) for dtype, name in DTYPE_NAMES.items()}

Tensors = dict[str, Tensor]


class DamagedError(Exception):
    """A shard that is not what was written."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an entry's tensors lie in its shard: per tensor name, dtype, shape, first and last byte."""

    tensors: tuple[tuple[str, str, tuple[int, ...], int, int], ...]
    checksum: int


_PLACE: Packing = (
    lambda place: (place[0], place[1].tensors, place[1].checksum),
    lambda values: (values[0], Entry(*values[1:])),
)


class Store:
    """The entries of one folder, of those keys that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.set_aside: list[Path] = []
        """Damaged shards that were found and renamed; their entries count as missing."""
        self._places: NamedShelf[tuple[str, Entry]] = NamedShelf(*_PLACE)
        self._used: set[str] = set()
        self._resident: dict[str, Tensors] = {}
        self._room = RESIDENT_BYTES
        self._seen: set[str] = set()
        self._wanted: NamedShelf[bool] = NamedShelf()

    def want(self, keys: Iterable[str]) -> None:
        """Look for these keys as well from now on; keys that nobody wants take no room."""
        for key in keys:
            self._wanted[key] = True
        self._seen.clear()
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that appeared since the last look."""
        fresh = iter([path for path in shards(self.folder) if path.name not in self._seen])
        while part := list(islice(fresh, INDEXED_AT_ONCE)):
            found: dict[str, tuple[str, Entry]] = {}
            for path in part:
                self._seen.add(path.name)
                try:
                    entries = read_index(path)
                except DamagedError:
                    self._put_aside(path)
                except FileNotFoundError:
                    pass
                else:
                    for key in [key for key, wanted in self._wanted.gather(entries) if wanted]:
                        found.setdefault(key, (path.name, entries[key]))
            for key in self.missing(found):
                self._places[key] = found[key]
                self._used.add(found[key][0])

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of many keys that are not there."""
        return [key for key, place in self._places.gather(keys) if place is None]

    def get(self, key: str) -> Tensors:
        """The tensors of one entry, as they were written.

        Raises:
            DataError: when the shard was damaged since it was written; it is set aside.
        """
        if key in self._resident:
            return self._resident[key]
        shard, entry = self._places[key]
        path = self.folder / shard
        try:
            tensors = read_entry(path, entry)
        except DamagedError:
            self._put_aside(path)
            raise DataError(
                f"{path} was damaged after it was written, and is set aside as {path.name}{DAMAGED}.",
                ["start the same command again: what was in it is encoded anew; look after the disk, or the copy"],
            ) from None
        except OSError as error:
            raise DataError(
                f"{path} can no longer be read: {error.strerror}.",
                ["bring the disk or the folder back, or start the same command again to encode anew"],
            ) from error
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= self._room:
            self._room -= size
            self._resident[key] = tensors
        return tensors

    def add(self, entries: Mapping[str, Tensors]) -> Path:
        """Write one shard; its name follows from its keys, so the same work done twice gives one file.

        Raises:
            StorageError: if the disk is full or the folder cannot be written.
        """
        name = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:32]
        path = self.folder / f"shard-{name}.safetensors"
        flat = {f"{key}/{part}": tensor for key, parts in entries.items() for part, tensor in parts.items()}
        sums = {key: _checksum([tensor_bytes(parts[part]) for part in sorted(parts)]) for key, parts in entries.items()}
        write_safetensors(path, flat, {"format": FORMAT, "crc32": json.dumps(sums, sort_keys=True)})
        self._seen.discard(path.name)
        for key in entries:
            if key not in self._wanted:
                self._wanted[key] = True
        self.refresh()
        return path

    def touch(self) -> None:
        """Note on the shards in use that they are, for `finetune cache --unused`; a read-only folder is left alone."""
        for shard in self._used:
            with contextlib.suppress(OSError):
                os.utime(self.folder / shard)

    @contextlib.contextmanager
    def claim(self, work: str) -> Iterator[bool]:
        """Whether this process may do a piece of work, named in hex; nobody else may until the block ends or we die.

        A file system without locks grants every claim: work done twice is wasted, not wrong.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield _locked(descriptor, int(work[:15], 16))
        finally:
            os.close(descriptor)

    def _put_aside(self, path: Path) -> None:
        for key in [key for key, (shard, _) in self._places.each() if shard == path.name]:
            del self._places[key]
        self._used.discard(path.name)
        self.set_aside.append(path)
        with contextlib.suppress(OSError):  # another process may have been first; a read-only folder keeps it
            path.rename(path.with_name(path.name + DAMAGED))


def shards(folder: Path) -> list[Path]:
    """The shards of a folder: plain files under the names that `Store.add` gives, and nothing else."""
    return sorted(path for path in folder.glob(SHARDS) if SHARD.fullmatch(path.name) and path.is_file())


def _locked(descriptor: int, place: int) -> bool:
    """Lock one byte of a file, past its end if need be; the kernel lets go when the process ends, however it ends."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def read_index(path: Path) -> dict[str, Entry]:
    """What a shard holds, from its header alone.

    Raises:
        DamagedError: if it is not a whole shard of this version.
        FileNotFoundError: if it went away.
    """
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise DamagedError("no header")
            header: dict[str, Any] = json.loads(stream.read(length))
            metadata = header.pop("__metadata__")
            sums: dict[str, int] = json.loads(metadata["crc32"])
            parts: dict[str, list[tuple[str, str, tuple[int, ...], int, int]]] = {key: [] for key in sums}
            end = 0
            for full, item in header.items():
                key, _, name = full.partition("/")
                begin, end_here = item["data_offsets"]
                end = max(end, end_here)
                place = (name, item["dtype"], tuple(item["shape"]), 8 + length + begin, 8 + length + end_here)
                parts[key].append(place)
            whole = os.fstat(stream.fileno()).st_size == 8 + length + end
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(str(error)) from error
    if not whole or metadata.get("format") != FORMAT:
        raise DamagedError("cut short, or of another version")
    return {key: Entry(tuple(sorted(places)), sums[key]) for key, places in parts.items()}


def read_entry(path: Path, entry: Entry) -> Tensors:
    """The tensors of one entry, checked.

    Raises:
        DamagedError: if a byte is missing or not the one that was written.
    """
    with open(path, "rb", buffering=0) as stream:
        data = [os.pread(stream.fileno(), end - begin, begin) for _, _, _, begin, end in entry.tensors]
    if _checksum(data) != entry.checksum:
        raise DamagedError("its checksum is another one")
    return {
        name: torch.frombuffer(bytearray(raw), dtype=_DTYPES[dtype]).reshape(shape)
        for (name, dtype, shape, _, _), raw in zip(entry.tensors, data, strict=True)
    }


def _checksum(parts: Sequence[bytes | memoryview]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return total
