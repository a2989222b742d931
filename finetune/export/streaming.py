"""Large files written and compared tensor by tensor: each is made when its turn comes, so none is held twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune import storage
from finetune.header import open_tensors, read_header

HASHES = {"modelspec.hash_sha256": "0x" + "0" * 64, "sshs_model_hash": "0" * 64}
"""Entries about the bytes of the tensors, with what stands in their place until they are known."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its shape and number format, on the meta device, and how it is made."""

    like: Tensor
    make: Callable[[], Tensor]


Plan = Mapping[str, Planned]
"""Name in the file -> tensor."""
Digests = Mapping[str, str]
"""Name in the file -> SHA-256 over its number format, shape and bytes."""


def planned(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Planned:
    """One entry of a plan."""
    return Planned(torch.empty(shape, dtype=dtype, device="meta"), make)


def write(path: Path, plan: Plan, metadata: Mapping[str, str], *, hashed: bool = False) -> Digests:
    """Write the file where it is; for folders that get their final name later.

    Args:
        hashed: add ModelSpec's and kohya's hashes of the tensors' bytes; the header is written again at the end.

    Returns:
        what `differing` compares the file with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    likes = {name: entry.like for name, entry in plan.items()}
    digest = hashlib.sha256()
    digests = {}
    with open(path, "wb") as stream:
        stream.write(storage.safetensors_header(likes, {**metadata, **(HASHES if hashed else {})}))
        for name in storage.tensor_order(likes):
            tensor = plan[name].make()
            assert tensor.shape == plan[name].like.shape and tensor.dtype == plan[name].like.dtype, name
            data = storage.tensor_bytes(tensor)
            stream.write(data)
            digests[name] = _digest(storage.dtype_name(tensor), tuple(tensor.shape), data)
            if hashed:
                digest.update(data)
        if hashed:
            found = digest.hexdigest()
            stream.seek(0)
            # keep: hashes of one length each, so the header keeps its own.
            entries = {**metadata, "modelspec.hash_sha256": f"0x{found}", "sshs_model_hash": found}
            stream.write(storage.safetensors_header(likes, entries))
        stream.flush()
        os.fsync(stream.fileno())
    return digests


def differing(path: Path, digests: Digests) -> Iterator[str]:
    """Names of tensors that a file lacks, has besides, or holds with other bits than were written."""
    header = read_header(path)
    held = set(header.tensors)
    yield from (f"{name} is missing." for name in sorted(set(digests) - held))
    yield from (f"{name} was not planned." for name in sorted(held - set(digests)))
    with open_tensors(header) as tensors:
        for name in sorted(held & set(digests)):
            entry = header.tensors[name]
            if _digest(entry.dtype, entry.shape, tensors.raw(name)) != digests[name]:
                yield f"{name} is different."


def _digest(dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> str:
    found = hashlib.sha256(f"{dtype} {shape} ".encode())
    found.update(data)
    return found.hexdigest()
