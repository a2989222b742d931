"""What earlier scans saw of a folder, so that unchanged pictures are not decoded again.

An entry holds for a picture whose file was not touched (size, modification and change time, inode), or whose
bytes have the same sha256. It is one line, appended as soon as the picture was looked at: a killed scan goes on
where it was, and several processes read what the others have found. It lies outside the pictures' folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from data_tools.errors import Problem, StorageError
from data_tools.images import DECODER, Color, color_name
from data_tools.journal import VARIABLE, Journal, default_folder
from data_tools.processes import ALONE, Share
from data_tools.records import ImageRecord
from data_tools.shelves import Index, NamedShelf, packing

Outcome = ImageRecord | Problem
"""What looking at one picture gave."""
SETTLED_NS = 2_000_000_000
"""A file changed less than this before it was read may change again without a trace in its times."""
PROBLEM_PARTS, RECORD_PARTS = 4, 5
"""What is said of a picture: words on why it cannot be used, or size, hashes and notes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: file, its marks when it was read, whether these can be trusted, digest of its bytes, outcome."""

    name: str
    marks: Sequence[int]
    settled: bool
    digest: str
    said: list[Any]

    @classmethod
    def of(cls, name: str, status: os.stat_result, read_at: int, digest: str, outcome: Outcome) -> Entry:
        """What was seen in a file; `status` and `read_at` (ns) are from before its bytes were read."""
        settled = read_at - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
        return cls(name, marks_of(status), settled, digest, _said(outcome))

    def outcome(self, status: os.stat_result) -> Outcome | None:
        """What was seen, for a file that nobody has touched since; else None."""
        if not self.settled or tuple(self.marks) != marks_of(status):
            return None
        return _outcome(self.name, self)


_ENTRY = packing(Entry)


def marks_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written, replaced, or given an old modification time."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class Memory:
    """The entries about one folder, and the file to which this process appends its own."""

    def __init__(
        self,
        root: Path,
        background: Color,
        *,
        folder: Path | None = None,
        share: Share | None = None,
        fresh: bool = False,
    ) -> None:
        """Read what is known of the dataset folder `root`, decoded on `background`.

        Args:
            root: the dataset folder.
            background: red, green, blue behind transparent pixels; another one is another memory.
            folder: where memories lie; `default_folder()` if None. Several machines need a shared one.
            share: which process this is.
            fresh: forget everything first.

        Raises:
            StorageError: the memory's folder cannot be made or written.
        """
        key = f"{os.path.realpath(root)}\n{color_name(background)}\n{PIL.__version__}\n{DECODER}"
        self.share = share or ALONE
        self.journal = Journal((folder or default_folder()) / "scans" / _short(key), self.share, fresh)
        self.entries: NamedShelf[Entry] = NamedShelf(*_ENTRY)
        self._by_digest = Index()
        self.refresh()
        self.journal.compact((_ENTRY[0](entry) for _, entry in self.entries.each()), self.entries.about())

    def recall(self, name: str, status: os.stat_result) -> Outcome | None:
        """The outcome for a file that nobody has touched since it was looked at; else None."""
        entry = self.entries.get(name)
        return None if entry is None else entry.outcome(status)

    def knows(self, name: str, status: os.stat_result) -> bool:
        """Whether some process has looked at the file as it is now."""
        entry = self.entries.get(name)
        return entry is not None and tuple(entry.marks) == marks_of(status)

    def recall_bytes(self, name: str, digest: str) -> Outcome | None:
        """The outcome for a file of the same bytes, under whatever name; else None."""
        for place in reversed(self._by_digest.places(digest)):
            entry = self.entries.nth(place)
            if entry.digest == digest:
                return _outcome(name, entry)
        return None

    def keep(self, entry: Entry) -> None:
        """Remember what was seen, for this process and for the others.

        Raises:
            StorageError: the disk is full.
        """
        self._add(entry)
        self.journal.append(_ENTRY[0](entry))

    def refresh(self) -> int:
        """Read what was appended since the last call, by all processes; how many entries that was."""
        count = 0
        for value in self.journal.news():
            try:
                entry = Entry(*value)
                whole = len(entry.said) in (PROBLEM_PARTS, RECORD_PARTS) and len(entry.marks) > 0
            except TypeError:
                continue
            if whole and isinstance(entry.name, str) and isinstance(entry.digest, str):
                self._add(entry)
                count += 1
        return count

    def close(self) -> None:
        """Close the file; everything is on its way to the disk already."""
        self.journal.close()

    def _add(self, entry: Entry) -> None:
        self.entries[entry.name] = entry
        self._by_digest.add(entry.digest)


def open_memory(
    root: Path, background: Color, share: Share | None = None, fresh: bool = False
) -> tuple[Memory | None, str | None]:
    """The memory of a folder; or None and the reason, where there is no place for one. Looking works without.

    Raises:
        StorageError: no place for one, and several processes that would meet there.
    """
    try:
        return Memory(root, background, share=share, fresh=fresh), None
    except StorageError as error:
        if share is not None and share.count > 1:
            raise StorageError(
                f"{error} Several processes meet there: point {VARIABLE} to a folder they share."
            ) from error
        return None, str(error)


@contextmanager
def remembering(root: Path, background: Color, share: Share | None = None) -> Iterator[Memory | None]:
    """`open_memory` for a while; None as well where there is no such folder, which others tell."""
    memory = open_memory(root, background, share)[0] if Path(root).is_dir() else None
    try:
        yield memory
    finally:
        if memory is not None:
            memory.close()


class Numbers:
    """Numbers about pictures, by the digests of their files: what was once measured is not measured again."""

    def __init__(self, kind: str, key: str, share: Share | None = None, folder: Path | None = None) -> None:
        """Read what is known; without a writable place one process remembers nothing, and everything works.

        Args:
            kind: the folder in which they lie, such as measures.
            key: everything that other numbers would follow from.
            share: which process this is.
            folder: where memories lie; `default_folder()` if None.

        Raises:
            StorageError: no writable place, and several processes that would meet there.
        """
        self.share = share or ALONE
        self.known = NamedShelf[dict[str, Any]]()
        self._journal: Journal | None = None
        try:
            self._journal = Journal((folder or default_folder()) / kind / _short(key), self.share)
        except StorageError:
            if self.share.count > 1:
                raise
        self.refresh()
        if self._journal is not None:
            self._journal.compact(map(list, self.known.each()), self.known.about())

    def refresh(self) -> int:
        """Read what was appended since the last call, by all processes; how many entries that was."""
        count = 0
        for value in self._journal.news() if self._journal is not None else ():
            with suppress(ValueError, TypeError):
                digest, numbers = value
                self.known[digest] = dict(numbers)
                count += 1
        return count

    def keep(self, digest: str, numbers: dict[str, Any]) -> None:
        """Remember; a full disk only means that it is measured again next time."""
        self.known[digest] = numbers
        if self._journal is not None:
            with suppress(StorageError):
                self._journal.append([digest, numbers])

    def close(self) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _short(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:24]


def _said(outcome: Outcome) -> list[Any]:
    if isinstance(outcome, Problem):
        return [outcome.what, outcome.why, outcome.remedy, outcome.code]
    return [outcome.width, outcome.height, outcome.pixel_sha256, outcome.phash, list(outcome.notes)]


def _outcome(name: str, entry: Entry) -> Outcome:
    if len(entry.said) == PROBLEM_PARTS:
        what, why, remedy, code = entry.said
        return Problem(name, what, why, remedy, code=code)
    width, height, pixels, looks, notes = entry.said
    return ImageRecord(
        name, width, height, (), sha256=entry.digest, pixel_sha256=pixels, phash=looks, notes=tuple(notes)
    )
