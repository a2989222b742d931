"""Reading files that may be anything, and writing one so that a crash leaves the old one whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_tools.errors import STORAGE, RefusedError, StorageError, shown

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What a file system answers that cannot sync a folder, such as a mounted cloud drive."""


def kind_of(mode: int) -> str | None:
    """What a file with this `st_mode` is, or None for a regular file."""
    return next((name for test, name in KINDS if test(mode)), None)


def not_regular(kind: str) -> RefusedError:
    """The refusal of a pipe, socket, device or folder where a file is needed."""
    return RefusedError(
        f"is {kind}",
        "only regular files are opened, because reading this could block or never end",
        "move it out of the folder",
    )


def read_regular(path: Path | str, max_bytes: int) -> bytes:
    """All bytes of a regular file; a pipe, socket or device is refused without waiting for it.

    Raises:
        RefusedError: not a regular file, larger than `max_bytes`, or the system will not let it be read.
    """
    with open_regular(path, max_bytes) as file:
        return file.read()


@contextlib.contextmanager
def open_regular(path: Path | str, max_bytes: int) -> Iterator[BinaryIO]:
    """As `read_regular`, for what is read bit by bit."""
    try:
        # keep: O_NONBLOCK, because opening a named pipe without it waits for a writer that may never come.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            kind = kind_of(status.st_mode)
            if kind is not None:
                raise not_regular(kind)
            if status.st_size > max_bytes:
                raise RefusedError(
                    f"holds {status.st_size:,} bytes",
                    f"files above {max_bytes:,} bytes are not read",
                    "save a smaller version, or move it out of the folder",
                )
            yield file
    except OSError as error:
        raise unread(error) from error


def unread(error: OSError) -> RefusedError:
    """The refusal of a file that is gone, or that the system will not let be read."""
    return RefusedError(
        f"cannot be read ({error.strerror or error})",
        "its bytes are needed to check it",
        "mend its permissions or the disk, or move it out of the folder",
        STORAGE,
    )


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, make it durable, then rename: readers see the old file or the new one."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomic`, for what is written bit by bit; an error inside the block leaves the old file."""
    # keep: a short name, because the longest names of pictures leave no room for a longer one beside them.
    handle, temporary = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # keep: mkstemp makes files that only their owner can read; a mounted drive may have no modes to change.
        with contextlib.suppress(PermissionError):
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk or its permissions refuse inside the block into words for the user.

    Raises:
        StorageError: naming `path`, the reason and, where the disk is full, the free space.
    """
    try:
        yield
    except OSError as error:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        advice = "check its permissions, or choose another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing).free
            advice = f"{free:,} bytes are free in {shown(str(existing))}: free some space, or choose another folder"
        raise StorageError(f"{shown(str(path))} cannot be written ({error.strerror or error}); {advice}.") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can open folders at all (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise
        finally:
            os.close(handle)
