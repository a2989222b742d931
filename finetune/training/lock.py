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
TRIES = 100
"""Times to take a lock whose file is removed meanwhile."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is missing, until the block ends or the process dies.

    A folder that was made here and got nothing but the lock goes away again: a refused run leaves no trace. A folder
    with anything in it keeps its lock file, for who waits for it may have opened it already.

    Raises:
        BusyError: if another process holds it, naming its pid and host.
        StorageError: if the folder cannot be written.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    held = [_take(folder)]
    # A forked worker that outlives a killed run would hold the lock on: the kernel frees it with its last
    # descriptor.
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        os.ftruncate(held[0], 0)
        os.pwrite(held[0], json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        # keep: while the lock is still held, so that nobody begins in a folder that is about to go.
        _leave_no_trace(missing)
        _close(held)


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds; nothing is made or written.

    Raises:
        BusyError: if it is held.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def _take(folder: Path) -> int:
    """The locked descriptor of the lock file that lies in the folder."""
    for _ in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # removed in between by a run that was refused
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be written: {error.strerror}.",
                ["check the folder's permissions and that its disk is there, or choose another output_dir."],
            ) from error
        try:
            _lock(descriptor, folder)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_FILE)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        # keep: a refused run has removed the file that was just locked; another may lie there now.
        os.close(descriptor)
    if not folder.is_dir():
        raise StorageError(f"{folder} cannot be made there.", ["choose another output_dir."])
    raise StorageError(
        f"{folder} cannot be locked: its {LOCK_FILE} goes away again and again.",
        ["see what removes it, or choose another output_dir."],
    )


def _leave_no_trace(made: list[Path]) -> None:
    """Remove folders that were made for nothing but the lock, from the inside out, as far as they are empty."""
    try:
        if made and [path.name for path in made[0].iterdir()] == [LOCK_FILE]:
            (made[0] / LOCK_FILE).unlink()
            for place in made:
                place.rmdir()
    except OSError:
        return


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
