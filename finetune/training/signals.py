"""Stop requests: SIGINT and SIGTERM finish the step, save, and leave with exit code 75; a second one ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.listening = False
        """True once the loop runs; before, a stop loses nothing and happens at once."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or not self.listening:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request that the loop reads between steps.

    Handlers can only be set in the main thread; elsewhere (a notebook's worker) the request simply never
    comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
