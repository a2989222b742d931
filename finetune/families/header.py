"""The header of a safetensors file, read without torch and without trust; it alone tells what a file holds.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, UnsafeError

LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Number formats of the file format -> bytes per number."""
SHOWN = 6
"""At most so many problems of one header are listed."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        dtype: a name in DTYPE_BYTES.
        shape: as stored, row-major.
        start: its first byte, counted from the beginning of the file.
        size: how many bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        path: where the file is.
        entries: tensor name -> where and what.
        metadata: the file's own notes, strings only.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None if the file has no such tensor."""
        entry = self.entries.get(name)
        return entry.shape if entry else None


def read_header(path: Path) -> Header:
    """Read and check the header: every tensor lies inside the file, none overlaps, no name stands twice.

    Raises:
        ConfigError: if there is no such file, or it is cut short.
        UnsafeError: if the header contradicts itself or the file, which no honest writer produces.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ConfigError(
                    f"{path.name} has {size:,} bytes and announces a header of {length:,}: it is no safetensors file, "
                    "or cut short; fetch it again."
                )
            if length > LARGEST_HEADER:
                raise UnsafeError(f"{path.name} announces a header of {length:,} bytes; the format allows 100 MB.")
            text = file.read(length)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}.") from None
    document = _parse(path, text)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeError(f"{path.name}: __metadata__ must hold texts only, and does not; fetch the file again.")
    problems: list[str] = []
    entries = {name: entry for name, value in document.items() if (entry := _entry(name, value, length + 8, problems))}
    problems += _misplaced(entries, length + 8, size)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UnsafeError(
            f"{path.name} has a header that contradicts itself, so nothing is read from it; fetch the file again:",
            [*problems[:SHOWN], *more],
        )
    return Header(path, entries, metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UnsafeError(f"{path.name}: {twice[:100]!r} stands twice in its header; fetch the file again.")
        return dict(pairs)

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path.name} is no safetensors file: its header is not JSON ({str(error)[:80]}). A pickled checkpoint "
            "that was renamed looks like this; get the .safetensors of the same model."
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path.name} is no safetensors file: its header is no JSON object.")
    return document


def _entry(name: str, value: Any, first: int, problems: list[str]) -> Entry | None:
    shown = repr(name[:100])
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        problems.append(f"{shown} lacks dtype, shape or data_offsets")
        return None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPE_BYTES:
        problems.append(f"{shown} has the number format {str(dtype)[:20]!r}, which is not known")
        return None
    whole = [shape, offsets]
    if not all(isinstance(w, list) and all(type(n) is int and n >= 0 for n in w) for w in whole) or len(offsets) != 2:
        problems.append(f"{shown} has a shape or place that is not made of whole numbers")
        return None
    size = offsets[1] - offsets[0]
    if size != prod(shape) * DTYPE_BYTES[dtype]:
        problems.append(f"{shown} of {dtype} {shape} needs {prod(shape) * DTYPE_BYTES[dtype]} bytes and has {size}")
        return None
    return Entry(dtype, tuple(shape), first + offsets[0], size)


def _misplaced(entries: dict[str, Entry], first: int, size: int) -> list[str]:
    problems, end = [], first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start < end and entry.size:
            problems.append(f"{name[:100]!r} overlaps the tensor before it")
        end = max(end, entry.start + entry.size)
    if end > size:
        problems.append(f"the tensors end at byte {end:,}, the file at {size:,}")
    return problems
