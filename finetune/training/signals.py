"""What is asked of a running training from outside: stop, or save and go on.

    SIGINT, SIGTERM, SIGUSR1, a file `stop` in the run folder, train.max_hours   finish the step, save, exit with 75
    SIGUSR2, a file `save` in the run folder                                     save after this step, go on
    a second SIGINT, SIGTERM or SIGUSR1                                          end at once; what is saved is whole
                                                                                 (under a launcher: two seconds later)
    any of them before the first step                                            end at once; 75 all the same, but for
                                                                                 SIGINT

Handlers only set a flag; the loop reads it between two steps, because a save inside a handler could meet a save.
Several processes exchange what they were asked while they compute the next step, and all do it after that one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed

from finetune.errors import StoppedOnRequest

STOP_FILE = "stop"
SAVE_FILE = "save"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK_SECONDS = 0.5
"""The run folder is looked at no more often than this: on a mounted drive every look is a message."""

HEARD = b"\nStopping: this step is finished and saved first. Once more ends at once.\n"
ECHO_SECONDS = 2.0
"""Within this a launcher's second signal is the first one's echo."""
PARTING_SECONDS = 2.0
"""How much longer than the first process the others stay, so that it can say its last word and end."""


class Requests:
    """Whether somebody asked the run to stop or to save.

    Attributes:
        stop: why to stop, in words, or None.
        save: whether to save after this step and go on.
        listening: True once the loop runs; before, a stop loses nothing and happens at once.
        early: the signal that ended the run before, unless a person did with Ctrl-C.
    """

    def __init__(
        self, folder: Path, max_hours: float | None = None, *, launched: bool = False, speaking: bool = True
    ) -> None:
        """Watch `folder` for the two files, and the clock from now on; None: no limit.

        Args:
            launched: whether a launcher passes on signals that a terminal has sent to all processes already.
            speaking: whether this process answers a signal on stderr; of several only the first.
        """
        self.stop: str | None = None
        self.save = False
        self.listening = False
        self.early: str | None = None
        self._folder = folder
        self._echo = ECHO_SECONDS if launched else 0.0
        self._speaking = speaking
        self._heard = 0.0
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
        now = time.monotonic()
        if not self.listening and number != signal.SIGINT:
            self.early = signal.Signals(number).name
        if not self.listening or (self.stop is not None and now - self._heard >= self._echo):
            raise KeyboardInterrupt
        self._heard = now
        if self._speaking and self.stop is None:
            # keep: print is not safe in a handler, which may have interrupted a print; this is one system call.
            with contextlib.suppress(OSError):
                os.write(2, HEARD)
        self.stop = f"{signal.Signals(number).name} came"


class Agreement:
    """What any process was asked, told to all of them at the same step.

    One process hears at once. Several hear one step later: the question of a step goes round, over a group of the
    processors and not of the accelerators, while the next step is computed, so that nothing waits for a device.
    """

    def __init__(self, requests: Requests, processes: int, *, is_main_process: bool) -> None:
        self._requests = requests
        self._is_main_process = is_main_process
        # keep: the others wait here while the first process renders a sheet.
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=6)) if processes > 1 else None
        self._asked = torch.zeros(2)
        self._under_way: torch.distributed.Work | None = None

    def after_step(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, after the step that was just made."""
        requests = self._requests
        if self._is_main_process:
            requests.look()
        own = torch.tensor([float(requests.stop is not None), float(requests.save)])
        requests.save = False
        if self._group is None:
            return bool(own[0]), bool(own[1])
        if self._under_way is not None:
            self._under_way.wait()
        stop, save = (self._asked > 0).tolist()
        self._asked = own
        self._under_way = torch.distributed.all_reduce(own, group=self._group, async_op=True)
        return stop, save


def leave_together(wait_for_all: Callable[[], None], *, is_main_process: bool) -> None:
    """A launcher ends all processes as soon as one ends with a code, and the first may be saving yet."""
    wait_for_all()
    if not is_main_process:
        time.sleep(PARTING_SECONDS)


@contextlib.contextmanager
def requests_from_signals(requests: Requests) -> Iterator[Requests]:
    """Let signals reach `requests` until the block ends.

    Handlers can only be set in the main thread; elsewhere (a notebook's worker) only files and the clock ask.

    Raises:
        StoppedOnRequest: when a scheduler's signal came before the first step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, requests._note) for number in (*STOPPING, signal.SIGUSR2)}
    try:
        yield requests
    except KeyboardInterrupt:
        if requests.early is None:
            raise
        raise StoppedOnRequest(
            f"Stopped before the first step of this start ({requests.early} came); whatever was rendered, encoded or "
            "saved is kept, and the same command goes on from there."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
