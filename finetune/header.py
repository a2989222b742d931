"""The header of a safetensors file, read by hand: without torch, in bounded memory, trusting nothing.

A safetensors file is eight bytes of length, that many bytes of JSON, and the tensors end to end. Whoever wrote the
file may have meant harm, so every number is checked before it is used and every text is cleaned before it is shown.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune.errors import CheckpointError, UnsafeError, first_few

LARGEST_HEADER = 25_000_000
"""Bytes. A full SDXL checkpoint needs 0.4 million; the library's own limit of 100 million can fill a small memory."""
MOST_DIMENSIONS = 16
PICKLED = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
WIDTHS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Number format -> bits per element."""
PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip
"""Number formats that numpy knows."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of the region after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What a file says about itself, checked.

    Attributes:
        metadata: free text pairs; anything may stand there, see `clean`.
        tensors: name -> where it lies, in order of the file.
        offset: byte at which the tensors begin.
        size: bytes of the whole file.
    """

    path: Path
    metadata: dict[str, str] = field(repr=False)
    tensors: dict[str, Entry] = field(repr=False)
    offset: int
    size: int

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, row-major; None if the file has no such tensor."""
        entry = self.tensors.get(name)
        return entry.shape if entry else None


def read_header(path: Path) -> Header:
    """Read and check the header of a file; the tensors are not touched.

    Raises:
        UnsafeError: for pickled weights, which run code when they are opened.
        CheckpointError: for a missing file, and for one that is no whole and sound safetensors file: all that is
            wrong with it.
    """
    if path.suffix.lower() in PICKLED:
        raise UnsafeError(
            f"{path} is a pickle, which can run code when it is opened, so it is not opened here.",
            ["get the .safetensors of the same model, or convert it on a machine you can afford to lose."],
        )
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(LARGEST_HEADER, size - 8):
                raise _bad(path, [_length_problem(start, length, size)])
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read.", [f"{error.strerror or error}; check the name and the permissions."]
        ) from error
    document = _parse(path, raw)
    metadata = document.pop("__metadata__", {})
    problems = [] if isinstance(metadata, dict) else ["__metadata__ is not a table of texts."]
    if isinstance(metadata, dict):
        problems += [
            f"__metadata__[{clean(key, 40)!r}] is not a text."
            for key, value in metadata.items()
            if type(value) is not str
        ]
    tensors: dict[str, Entry] = {}
    for name, value in document.items():
        entry = _entry(value)
        if isinstance(entry, str):
            problems.append(f"{clean(name, 80)} {entry}")
        else:
            tensors[name] = entry
    region = size - 8 - length
    problems += _layout_problems(tensors, region) if not problems else []
    if problems:
        raise _bad(path, problems)
    in_order = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    return Header(path, metadata, in_order, 8 + length, size)


@dataclass(frozen=True)
class Tensors:
    """An open file: tensors come as numpy arrays, each read when it is asked for and held by nobody but the caller."""

    header: Header
    stream: BinaryIO

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor as they stand in the file.

        Raises:
            CheckpointError: if the file has become shorter since its header was read.
        """
        entry = self.header.tensors[name]
        self.stream.seek(self.header.offset + entry.start)
        found = self.stream.read(entry.size)
        if len(found) != entry.size:
            raise CheckpointError(f"{self.header.path} was cut off while it was being read; fetch it again.")
        return found

    def array(self, name: str) -> NDArray[Any]:
        """A tensor; bf16 and fp8 come as fp32, which holds all their values.

        Raises:
            CheckpointError: for packed formats such as F4, whose elements are not whole bytes.
        """
        entry = self.header.tensors[name]
        raw = self.raw(name)
        if entry.dtype in PLAIN:
            return np.frombuffer(raw, dtype=PLAIN[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "BF16":
            wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(entry.shape)
        if entry.dtype in {"F8_E4M3", "F8_E5M2"}:
            return _eight_bits(entry.dtype)[np.frombuffer(raw, dtype=np.uint8)].reshape(entry.shape)
        raise CheckpointError(
            f"{self.header.path} holds {name} as {entry.dtype}, which cannot be computed with here.",
            ["convert it to fp16, bf16 or fp32 with the program that wrote it."],
        )


@contextmanager
def open_tensors(header: Header) -> Iterator[Tensors]:
    """Open a file; nothing is read before it is asked for."""
    # keep: read, not mapped: pages of a mapped file count as ours until it is closed, and a shrinking one kills us.
    with open(header.path, "rb") as stream:
        yield Tensors(header, stream)


def hash_bytes(header: Header) -> tuple[str, str]:
    """SHA-256 of the file and of the tensors without their header, 64 hex digits each, in one pass."""
    whole, body = hashlib.sha256(), hashlib.sha256()
    with open(header.path, "rb") as stream:
        whole.update(stream.read(header.offset))
        while chunk := stream.read(1 << 22):
            whole.update(chunk)
            body.update(chunk)
    return whole.hexdigest(), body.hexdigest()


def clean(text: object, longest: int = 400) -> str:
    """A text of a stranger, fit for a terminal: one line, no control or direction-changing characters, not endless."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[: longest * 4])
    line = " ".join(line.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


OTHER_KINDS = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a WebP picture, a film or a sound",
    b"GGUF": "a GGUF model",
    b"%PDF": "a PDF",
}
"""How files begin that are named by mistake -> what they are."""


def _length_problem(start: bytes, length: int, size: int) -> str:
    if len(start) < 8:
        return f"it has {size} bytes, but the length of the header alone takes eight."
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it begins like a zip archive or a pickle; only safetensors are read."
    if what := next((words for magic, words in OTHER_KINDS.items() if start.startswith(magic)), None):
        return f"it is {what}, and only safetensors are read."
    if start.isascii() and start.decode().replace("\n", " ").replace("\t", " ").isprintable():
        return "it is a text, perhaps a pointer of git-lfs or a web page; fetch the real file."
    return f"its header claims to be {length:,} bytes long, but the file has {size:,} (at most {LARGEST_HEADER:,})."


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counted = Counter(name for name, _ in pairs)
            repeated.extend(name for name, count in counted.items() if count > 1)
        return table

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        # keep: parsers recurse; brackets nested by the thousand end here.
        raise _bad(path, [f"its header is not JSON: {clean(error)}."]) from error
    if not isinstance(document, dict):
        raise _bad(path, ["its header is not a table of tensors."])
    if repeated:
        raise _bad(path, [f"{clean(name, 80)!r} appears in the header more than once." for name in repeated])
    return document


def _entry(value: Any) -> Entry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "is not described by exactly dtype, shape and data_offsets."
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        return f"has the unknown number format {clean(dtype, 40)!r}."
    whole = isinstance(shape, list) and isinstance(span, list) and len(span) == 2 and len(shape) <= MOST_DIMENSIONS
    if not whole or any(type(number) is not int or not 0 <= number < 1 << 62 for number in [*shape, *span]):
        return "has a shape or data_offsets that are not whole, sensible numbers."
    start, stop = span
    if (stop - start) * 8 != math.prod(shape) * WIDTHS[dtype]:
        needed = math.prod(shape) * WIDTHS[dtype] // 8
        return f"has {stop - start:,} bytes, but shape {shape} in {dtype} needs {needed:,}."
    return Entry(dtype, tuple(shape), start, stop)


def _layout_problems(tensors: dict[str, Entry], region: int) -> list[str]:
    """Tensors must fill the file from end to end: a gap can hide anything, an overlap is an attack or damage."""
    spans = sorted((entry.start, entry.stop, name) for name, entry in tensors.items())
    problems = []
    for (_, before, left), (start, _, right) in pairwise(spans):
        if start != before:
            what = "overlap" if start < before else f"leave {start - before:,} bytes between them"
            problems.append(f"{clean(left, 80)} and {clean(right, 80)} {what}.")
    first, last = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    if first != 0:
        problems.append(f"{first:,} bytes lie before the first tensor.")
    if last != region:
        why = "it was cut off" if last > region else "something was appended to it"
        problems.append(f"its tensors end at byte {last:,} but {region:,} bytes follow the header: {why}.")
    return problems


def _eight_bits(dtype: str) -> NDArray[np.float32]:
    """The 256 values of an 8-bit float: a sign, 4 or 5 bits of exponent, the rest of mantissa. Source: OCP OFP8 1.0."""
    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = (1 + mantissa) * 2.0 ** (exponent - bias)
    values = sign * np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal)
    if dtype == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa == 0, sign * np.inf, np.nan)[exponent == 31]
    return values.astype(np.float32)


def _bad(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file; fetch it again, or do not trust it.", first_few(problems)
    )
