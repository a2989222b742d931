"""Files that are either whole or absent, and the same bytes every time.

Everything is written beside its final name, fsynced and renamed; the folder is fsynced too, so that a power
cut leaves the old file or the new one. Tensors are stored as safetensors and everything else as JSON; nothing
is pickled.

safetensors 0.8.0 writes its metadata in random order, creates files with mode 0600 and never calls fsync,
hence the own writer. The format is documented at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from finetune.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_NAMES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}
"""torch number format -> its name in a safetensors header."""
LONGEST_STEM = 180
"""Bytes of a file's own name in the name of what is written beside it; file systems take 255 in all."""
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What a file system answers that cannot sync a folder, such as a mounted cloud drive."""
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, tensor by tensor: no second copy of the weights is held in memory.

    Tensors may be of any layout and on any device; shared memory is written once per name.

    Raises:
        StorageError: if the disk is full or the folder cannot be written; the old file is then untouched.
    """
    header = safetensors_header(tensors, metadata)
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with _replacing(path, size) as beside, open(beside, "xb", opener=_open_new) as stream:
        stream.write(header)
        for name in tensor_order(tensors):
            stream.write(tensor_bytes(tensors[name]))
        _sync(stream)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, on the CPU, and its metadata.

    Raises:
        CheckpointError: if the file is missing or is not a whole safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist.", ["check the name, or write the file first."]
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors.",
            [f"{error}; the file is damaged, half copied or of another kind: fetch or write it again."],
        ) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text entries of a file, without its tensors; empty if it is no safetensors file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """All before the first tensor: a length and a JSON header with sorted metadata, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in tensor_order(tensors):
        tensor = tensors[name]
        span = [position, position + tensor.nbytes]
        entries[name] = {
            "dtype": dtype_name(tensor),
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        position = span[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file: widest numbers first, so that every tensor is aligned, then by name."""
    return sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), dtype_name(tensors[name]), name)
    )


def dtype_name(tensor: Tensor) -> str:
    """Its number format as a safetensors header names it."""
    return DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file: row-major, little-endian."""
    import torch  # noqa: PLC0415 - who has a tensor has it already; who reads a run's documents shall not wait

    assert sys.byteorder == "little", "safetensors files are little-endian"
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs: two spaces, UTF-8, a newline at the end; NaN is not allowed.

    A table that is no dict, such as one that lies on the disk, is written row by row, one on each line.
    """
    if isinstance(value, Mapping) and not isinstance(value, dict):
        _write_table(path, value)
    else:
        write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_table(path: Path, table: Mapping[str, Any]) -> None:
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    with _replacing(path, None) as beside, open(beside, "xb", opener=_open_new) as stream:
        between = "{"
        for name, row in table.items():
            stream.write(f"{between}\n  {encode(name)}: {encode(row)}".encode())
            between = ","
        stream.write(b"{}\n" if between == "{" else b"\n}\n")
        _sync(stream)


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CheckpointError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist.", ["check the name, or write the file first."]
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON.", [f"{error}; restore it from a copy."]) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    data = text.encode()
    with _replacing(path, len(data)) as beside, open(beside, "xb", opener=_open_new) as stream:
        stream.write(data)
        _sync(stream)


def sha256_file(path: Path) -> str:
    """SHA-256 over a file's bytes, 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_weights(path: Path) -> str:
    """The same for a base model's file, read once per process unless its size or time changes."""
    stat = path.stat()
    return _sha256_unchanged(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache
def _sha256_unchanged(path: Path, size: int, modified: int) -> str:
    return sha256_file(path)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a new folder beside `path`; fill it. When the block ends, its files are fsynced and it is renamed
    to `path`. A folder already there is moved aside, kept until the new one is durable, and only then
    removed. When the block raises, the new folder goes away and the old one stays.

    Raises:
        StorageError: if the disk is full or the parent folder cannot be written.
    """
    beside = _beside(path, "part")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            yield beside
            publish(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk or its permissions refuse inside the block into a StorageError, whoever writes there.

    Other errors of the operating system, such as a file that a library looks for in vain, stay what they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise _storage_error(path, None, error) from error


def publish(source: Path, target: Path) -> None:
    """Give a file or folder that is written and checked its final name, on the same disk, durably."""
    try:
        if source.is_dir():
            sync_tree(source)
            _exchange(source, target)
        else:
            os.replace(source, target)
            _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error(target, None, error) from error


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_path(Path(root) / name)
        _sync_folder(Path(root))


def _exchange(new: Path, path: Path) -> None:
    old = _beside(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    replaced = path.exists()
    if replaced:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if replaced:
            os.rename(old, path)
        raise
    _sync_folder(path.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _replacing(path: Path, size: int | None) -> Iterator[Path]:
    beside = _beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        yield beside
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _storage_error(path, size, error) from error
    finally:
        with suppress(OSError):  # what went wrong before is what is told
            beside.unlink(missing_ok=True)


def _beside(path: Path, kind: str) -> Path:
    # keep: process numbers repeat across containers that share a disk.
    name = path.name.encode()[:LONGEST_STEM].decode(errors="ignore")
    return path.parent / f".{name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _open_new(name: str, flags: int) -> int:
    # 0666 less the umask, as every other program does: 0644 where nothing else is set.
    return os.open(name, flags, 0o666)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    try:
        _sync_path(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def _storage_error(path: Path, size: int | None, error: OSError) -> StorageError:
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    needed = "" if size is None else f" ({size:,} bytes are needed)"
    advice = "check the folder and its permissions, or choose another output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, None):
        free = shutil.disk_usage(existing if existing.is_dir() else existing.parent).free
        advice = f"{free:,} bytes are free in {existing}: free some space, or choose another output folder"
    return StorageError(f"{path} cannot be written{needed}.", [f"{error.strerror or error}; {advice}."])
