"""What earlier scans saw of a folder, so that unchanged pictures are not decoded again.

An entry holds for a picture whose file was not touched (size, modification and change time, inode), or whose
bytes have the same sha256. It is one line, appended as soon as the picture was looked at: a killed scan goes on
where it was, and several processes read what the others have found. It lies outside the pictures' folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from data_tools.errors import Problem, StorageError
from data_tools.files import storage_errors, write_atomic
from data_tools.images import DECODER, Color, color_name
from data_tools.processes import Share
from data_tools.records import ImageRecord

Outcome = ImageRecord | Problem
"""What looking at one picture gave."""
VARIABLE = "FINETUNE_CACHE"
SETTLED_NS = 2_000_000_000
"""A file changed less than this before it was read may change again without a trace in its times."""
ROOM_FOR_DEAD_LINES = 4
"""The file is rewritten when it holds more lines than this many per living entry."""


PROBLEM_PARTS, RECORD_PARTS = 4, 5
"""What is said of a picture: words on why it cannot be used, or size, hashes and notes."""


@dataclass(frozen=True)
class Entry:
    """One line: file, its marks when it was read, whether these can be trusted, digest of its bytes, outcome."""

    name: str
    marks: tuple[int, ...]
    settled: bool
    digest: str
    said: list[Any]


def default_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$FINETUNE_CACHE, or finetune/ in the user's cache folder."""
    if environment.get(VARIABLE):
        return Path(environment[VARIABLE])
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetune"


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
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:24]
        self.share = share or Share()
        self.place = (folder or default_folder()) / "scans" / name
        self.entries: dict[str, Entry] = {}
        self._by_digest: dict[str, Entry] = {}
        self._read_to: dict[Path, int] = {}
        with storage_errors(self.place):
            self.place.mkdir(parents=True, exist_ok=True)
            for path in self._files() if fresh else ():
                path.unlink(missing_ok=True)
            self.refresh()
            self._compact()
            self._log = open(self.place / f"{self.share.rank:05d}.jsonl", "ab")  # noqa: SIM115
            # keep: behind a line that was torn, because a whole one appended to it would be lost as well.
            os.write(self._log.fileno(), b"\n" if self._log.tell() else b"")

    def recall(self, name: str, status: os.stat_result) -> Outcome | None:
        """The outcome for a file that nobody has touched since it was looked at; else None."""
        entry = self.entries.get(name)
        if entry is None or not entry.settled or entry.marks != marks_of(status):
            return None
        return _outcome(name, entry)

    def knows(self, name: str, status: os.stat_result) -> bool:
        """Whether some process has looked at the file as it is now."""
        entry = self.entries.get(name)
        return entry is not None and entry.marks == marks_of(status)

    def recall_bytes(self, name: str, digest: str) -> Outcome | None:
        """The outcome for a file of the same bytes, under whatever name; else None."""
        entry = self._by_digest.get(digest)
        return None if entry is None else _outcome(name, entry)

    def keep(self, name: str, status: os.stat_result, digest: str, outcome: Outcome) -> None:
        """Append an entry. `status` is from before the bytes were read, so that a later change shows.

        Raises:
            StorageError: the disk is full.
        """
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
        entry = Entry(name, marks_of(status), settled, digest, _said(outcome))
        self._add(entry)
        line = _line(entry)
        with storage_errors(self.place):
            # keep: one write per line, unbuffered, so that lines of a killed process are whole or the last.
            os.write(self._log.fileno(), line)

    def refresh(self) -> int:
        """Read what was appended since the last call, by all processes; how many entries that was."""
        return sum(self._read(path) for path in self._files())

    def close(self) -> None:
        """Close the file; everything is on its way to the disk already."""
        self._log.close()

    def _files(self) -> list[Path]:
        return sorted(self.place.glob("*.jsonl"))

    def _read(self, path: Path) -> int:
        try:
            with open(path, "rb") as file:
                file.seek(self._read_to.get(path, 0))
                data = file.read()
        except FileNotFoundError:
            return 0
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to[path] = self._read_to.get(path, 0) + len(whole)
        count = 0
        for line in whole.splitlines():
            # keep: a line torn by a kill or a full disk is no entry; its picture is looked at again.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                name, marks, settled, digest, said = json.loads(line)
                if len(said) in (PROBLEM_PARTS, RECORD_PARTS):
                    self._add(Entry(name, tuple(marks), bool(settled), digest, said))
                    count += 1
        return count

    def _add(self, entry: Entry) -> None:
        self.entries[entry.name] = entry
        self._by_digest[entry.digest] = entry

    def _compact(self) -> None:
        """Rewrite the files as one, when a single process finds more dead lines than living ones."""
        size = sum(self._read_to.values())
        if self.share.count > 1 or not self.entries:
            return
        lines = [_line(entry) for entry in self.entries.values()]
        if size <= ROOM_FOR_DEAD_LINES * sum(map(len, lines)):
            return
        write_atomic(self.place / "00000.jsonl", b"".join(lines))
        for path in self._files():
            if path.name != "00000.jsonl":
                path.unlink(missing_ok=True)


def open_memory(
    root: Path, background: Color, share: Share | None = None, fresh: bool = False
) -> tuple[Memory | None, str | None]:
    """The memory of a folder; or None and the reason, where there is no place for one. Looking works without."""
    try:
        return Memory(root, background, share=share, fresh=fresh), None
    except StorageError as error:
        return None, str(error)


def _line(entry: Entry) -> bytes:
    values = [entry.name, entry.marks, entry.settled, entry.digest, entry.said]
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


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
