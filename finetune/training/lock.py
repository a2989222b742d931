"""One run per output folder: a lock that the kernel releases when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import BusyError, StorageError

LOCK_FILE = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is missing, until the block ends or the process dies.

    The file stays behind on purpose: deleting it would let two processes hold two different files of the same
    name.

    Raises:
        BusyError: if another process holds it, naming its pid and host.
        StorageError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}.",
            ["check the folder's permissions and that its disk is there, or choose another output_dir."],
        ) from error
    held = [descriptor]
    # A forked worker that outlives a killed run would hold the lock on: the kernel frees it with its last
    # descriptor.
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        _lock(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        _close(held)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(
            f"{folder} is in use by {_holder(descriptor)}.",
            ["wait until that run ends, stop it, or choose another output_dir."],
        ) from error
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be locked: {error.strerror}.",
            ["its file system has no locks, so two runs could mix; choose an output_dir on a local disk."],
        ) from error


def _close(held: list[int]) -> None:
    while held:
        os.close(held.pop())


def _holder(descriptor: int) -> str:
    """Who wrote the file last; a holder that has only just started may not have written yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
