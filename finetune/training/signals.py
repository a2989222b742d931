"""What is asked of a running training from outside: stop, or save and go on.

    SIGINT, SIGTERM, SIGUSR1, a file `stop` in the run folder, train.max_hours   finish the step, save, exit with 75
    SIGUSR2, a file `save` in the run folder                                     save after this step, go on
    a second SIGINT, SIGTERM or SIGUSR1                                          end at once; what is saved is whole

Handlers only set a flag; the loop reads it between two steps, because a save inside a handler could meet a save.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"
SAVE_FILE = "save"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK_SECONDS = 0.5
"""The run folder is looked at no more often than this: on a mounted drive every look is a message."""


class Requests:
    """Whether somebody asked the run to stop or to save.

    Attributes:
        stop: why to stop, in words, or None.
        save: whether to save after this step and go on.
        listening: True once the loop runs; before, a stop loses nothing and happens at once.
    """

    def __init__(self, folder: Path, max_hours: float | None = None) -> None:
        """Watch `folder` for the two files, and the clock from now on; None: no limit."""
        self.stop: str | None = None
        self.save = False
        self.listening = False
        self._folder = folder
        self._max_hours = max_hours
        self._ends = time.monotonic() + 3600 * max_hours if max_hours is not None else None
        self._next_look = 0.0

    def sweep(self) -> None:
        """Remove files that asked an earlier start of this run; the holder of the folder's lock calls it."""
        for name in (STOP_FILE, SAVE_FILE):
            (self._folder / name).unlink(missing_ok=True)

    def look(self) -> None:
        """Take in the clock and the files; a file that is read is removed, so that it asks once."""
        now = time.monotonic()
        if self._ends is not None and now >= self._ends:
            self.stop = self.stop or f"train.max_hours={self._max_hours:g} is over"
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        if self._taken(STOP_FILE):
            self.stop = self.stop or f"a file named {STOP_FILE!r} asked for it"
        if self._taken(SAVE_FILE):
            self.save = True

    def _taken(self, name: str) -> bool:
        path = self._folder / name
        if not path.is_file():
            return False
        path.unlink(missing_ok=True)
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self.save = True
            return
        if self.stop is not None or not self.listening:
            raise KeyboardInterrupt
        self.stop = f"{signal.Signals(number).name} came"


@contextlib.contextmanager
def requests_from_signals(requests: Requests) -> Iterator[Requests]:
    """Let signals reach `requests` until the block ends.

    Handlers can only be set in the main thread; elsewhere (a notebook's worker) only files and the clock ask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, requests._note) for number in (*STOPPING, signal.SIGUSR2)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
