"""Lines that processes append and one another read: what long work has found so far, whatever kills it.

Each process writes a file of its own and reads all of them. A line is one JSON value, written in one call, so that
only the last one of a killed process can be torn; a torn line is no entry.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.files import storage_errors, whole_file
from data_tools.processes import Share

VARIABLE = "FINETUNE_CACHE"
ROOM_FOR_DEAD_LINES = 4
"""The files are rewritten when they hold more lines than this many times the living entries."""


def default_folder() -> Path:
    """$FINETUNE_CACHE, or finetune/ in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetune"


class Journal:
    """The files in one folder, and this process's own one among them."""

    def __init__(self, place: Path, share: Share, fresh: bool = False) -> None:
        """Make the folder where it is missing; with `fresh` forget what is there.

        Raises:
            StorageError: it cannot be made or written.
        """
        self.place, self.share = place, share
        self._read_to: dict[Path, int] = {}
        self._lines = 0
        with storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            for path in self._files() if fresh else ():
                path.unlink(missing_ok=True)
            self._log = self._open()

    def news(self) -> Iterator[Any]:
        """What was appended since the last call, by all processes."""
        for path in self._files():
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(self._read_to.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read_to[path] = self._read_to.get(path, 0) + len(line)
                    self._lines += 1
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)

    def append(self, value: Any) -> None:
        """Write one line, at once.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self.place):
            os.write(self._log, _line(value))

    def compact(self, living: Iterable[Any], count: int) -> None:
        """Rewrite the files as one that holds the `count` living entries, where most lines are dead; alone only."""
        if self.share.count > 1 or not count or self._lines <= ROOM_FOR_DEAD_LINES * count:
            return
        own = self.place / _name(0)
        with storage_errors(self.place):
            os.close(self._log)
            with whole_file(own) as file:
                file.writelines(map(_line, living))
            for path in self._files():
                if path != own:
                    path.unlink(missing_ok=True)
            self._read_to, self._lines = {own: own.stat().st_size}, count
            self._log = self._open()

    def close(self) -> None:
        """Close the file; everything is on its way to the disk already."""
        os.close(self._log)

    def _open(self) -> int:
        log = os.open(self.place / _name(self.share.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # keep: behind a line that was torn, because a whole one appended to it would be lost as well.
        os.write(log, b"\n" if os.fstat(log).st_size else b"")
        return log

    def _files(self) -> list[Path]:
        return sorted(self.place.glob("*.jsonl"))


def _name(rank: int) -> str:
    return f"{rank:05d}.jsonl"


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
