"""Work on many files at once, in processes that may die: the file at which one died is named, the others are done.

Decoders are C code fed with files from anywhere; one that crashes, or that the system kills for its memory, takes
its process along. Results come in order and a little ahead only, so that a million files are not a million waiting
tasks.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from PIL import Image

from data_tools.errors import Problem

Thing = TypeVar("Thing")
Done = TypeVar("Done")

MOST = 8
"""Workers at most unless asked for more: each may hold a 64 MP picture several times over."""
AHEAD = 8
"""Things per worker that may be done before the first one of them is asked for."""
IN_HAND = 2
"""Things that a worker has been told of, so that it need not wait for the next one."""
LOST = 70
"""Exit code of a worker that could not go on."""
FORKS = sys.platform == "linux"
"""Elsewhere forking is not safe in a process that has threads, and threads do the work; they die together."""


def count_of(workers: int | None, environment: Mapping[str, str] = os.environ) -> int:
    """How many workers there are: as asked for, else one per CPU core that is this process's, at most `MOST`."""
    cores = len(os.sched_getaffinity(0)) if FORKS else os.cpu_count() or 1
    beside = environment.get("LOCAL_WORLD_SIZE", "1")
    return workers or max(1, min(MOST, cores // max(1, int(beside) if beside.isdecimal() else 1)))


def death(name: str, code: int) -> Problem:
    """What is said of the file at which a worker died with this exit code (negative: a signal)."""
    killed = code == -signal.SIGKILL
    how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
    return Problem(
        name,
        f"kills the process that decodes it ({how or f'signal {-code}'}{', twice' if killed else ''})",
        "it probably needs more memory than there is" if killed else "the decoder cannot cope with its bytes",
        "save a smaller version" if killed else "save it again with another program, or remove it",
    )


def in_workers(
    work: Callable[[Thing], Done], things: Sequence[Thing], workers: int | None, died: Callable[[Thing, int], Done]
) -> Iterator[Done]:
    """The result of every thing, in order, from worker processes.

    Args:
        work: what is done with a thing; it runs in a copy of this process and changes nothing here. What it raises is
            raised here.
        things: looked up by the workers in their copies; never sent.
        workers: how many; see `count_of`.
        died: the result of a thing at which two workers died, the second time with nothing done beside it (which
            tells a file that needs too much memory from its neighbours); it gets the exit code, negative for a signal.
    """
    # keep: a process costs as much as a small picture or two.
    count = min(count_of(workers), -(-len(things) // IN_HAND))
    if not FORKS:
        yield from in_threads(work, things, workers)
        return
    # keep: here once, or each worker would import the decoders' Python parts for itself.
    Image.init()
    team = _Team(work, things, died)
    following = 0
    try:
        for _ in range(count):
            team.hire()
        for place in range(len(things)):
            while place not in team.results:
                ahead = min(len(things), place + AHEAD * count)
                team.todo.extend(range(following, ahead))
                following = max(following, ahead)
                team.go_on()
            yield team.results.pop(place)
    finally:
        team.dismiss()


@dataclass
class _Worker:
    """A process, and the places of the things it was told of, in order."""

    process: int
    line: Connection
    told: deque[int] = field(default_factory=deque)


@dataclass
class _Team(Generic[Thing, Done]):
    """The workers of one call; things are known by their places."""

    work: Callable[[Thing], Done]
    things: Sequence[Thing]
    died: Callable[[Thing, int], Done]
    workers: list[_Worker] = field(default_factory=list)
    todo: deque[int] = field(default_factory=deque)
    suspects: deque[int] = field(default_factory=deque)
    """At each of these a worker died once; they are tried again, alone."""
    tried: int | None = None
    """The suspect that is being tried."""
    results: dict[int, Done] = field(default_factory=dict)

    def hire(self) -> None:
        """Start one more worker."""
        ours, theirs = Pipe()
        process = os.fork()
        if process == 0:
            _serve(self.work, self.things, theirs, [ours, *(worker.line for worker in self.workers)])
        theirs.close()
        self.workers.append(_Worker(process, ours))

    def go_on(self) -> None:
        """Hand out what there is to do, then wait for an answer or a death."""
        self._hand_out()
        busy = {worker.line: worker for worker in self.workers if worker.told}
        for line in wait(list(busy)):
            worker = busy[line]  # type: ignore[index]
            try:
                answer, error = worker.line.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if error is not None:
                raise error
            place = worker.told.popleft()
            self.results[place] = answer
            self.tried = None if place == self.tried else self.tried

    def _hand_out(self) -> None:
        idle = not any(worker.told for worker in self.workers)
        if self.suspects and idle:
            self.tried = self.suspects.popleft()
            self._tell(self.workers[0], self.tried)
        while self.todo and not self.suspects and self.tried is None:
            worker = min(self.workers, key=lambda each: len(each.told))
            if len(worker.told) >= IN_HAND:
                break
            self._tell(worker, self.todo.popleft())

    def _tell(self, worker: _Worker, place: int) -> None:
        worker.told.append(place)
        # keep: a worker that is dead already is noticed by what it does not answer.
        with suppress(OSError):
            worker.line.send(place)

    def _bury(self, worker: _Worker) -> None:
        """A worker died at the first thing that it has not answered; the others are still to be done."""
        code = _end_of(worker)
        self.workers.remove(worker)
        self.hire()
        place = worker.told.popleft()
        self.todo.extendleft(reversed(worker.told))
        if place == self.tried:
            self.tried = None
            self.results[place] = self.died(self.things[place], code)
        else:
            self.suspects.append(place)

    def dismiss(self) -> None:
        """End all workers at once; none of them writes anything."""
        for worker in self.workers:
            os.kill(worker.process, signal.SIGKILL)
            _end_of(worker)
        self.workers.clear()


def _end_of(worker: _Worker) -> int:
    """Wait for the end of a worker: its exit code, negative for a signal."""
    worker.line.close()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(worker.process, 0)[1])
    except ChildProcessError:  # this process was started with SIGCHLD ignored, so that nobody knows
        return LOST


def _serve(
    work: Callable[[Thing], Done], things: Sequence[Thing], line: Connection, others: Sequence[Connection]
) -> None:
    """The life of a worker: a place comes, its result goes, until the line is closed."""
    try:
        # keep: the parent's handlers are not ours; Ctrl-C reaches all processes, and the parent decides.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.disable()
        # keep: collecting the parent's garbage here would run its finalizers a second time.
        gc.freeze()
        for other in others:
            other.close()
        while True:
            place = line.recv()
            try:
                answer: tuple[Done | None, Exception | None] = (work(things[place]), None)
            except Exception as error:  # whatever it is, it is the parent's to judge
                answer = (None, error)
            line.send(answer)
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(LOST)


def in_threads(work: Callable[[Thing], Done], things: Sequence[Thing], workers: int | None) -> Iterator[Done]:
    """As `in_workers`, in threads of this process: for what does not decode, or has been decoded well before."""
    threads = count_of(workers)
    ahead: deque[Future[Done]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for thing in things:
            ahead.append(pool.submit(work, thing))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # keep: cancel, or Ctrl-C would first do what is waiting.
        pool.shutdown(wait=True, cancel_futures=True)
