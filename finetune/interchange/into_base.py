"""Adapters added into the weights of a base, tensor by tensor: no more than one layer is held in memory.

Everything is computed in fp32 and rounded once, to the format of the base's own tensor. What rounding takes is
measured:

    | cast(W + D) - W - D | / | D |        (Frobenius norms over all changed weights)
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from data_tools.errors import counted
from finetune import storage
from finetune.dtypes import DTYPES, STORED
from finetune.errors import ConfigError
from finetune.header import Header, Tensors
from finetune.interchange.adapter import InterchangeError, Place, Update
from finetune.interchange.merging import DENSE, Part, Settings, Weighted, check_same_base
from finetune.interchange.names import Architecture, canonical_module
from finetune.interchange.reading import shortened
from finetune.interchange.weights import Weights, open_weights, read_tensor
from finetune.tracking import Reporter

COUNTS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""Numbers that are no weights, such as the positions in SD1's checkpoints; copied as they are."""
LARGEST_LOSS = 0.01
"""Share of the change that rounding may take before a merge is refused; `export` has the same limit."""


@dataclass
class IntoBase:
    """A base with adapters in it.

    Attributes:
        layers: how many weights were changed.
        lost: share of the change that rounding took.
        notes: what was left out.
    """

    path: Path
    layers: int = 0
    lost: float = 0.0
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        return [
            ("Written", str(self.path)),
            ("Changed", counted(self.layers, "weight")),
            ("Lost to rounding", f"{self.lost:.2%} of the change"),
            *(("Note", note) for note in self.notes),
        ]


@dataclass
class _Job:
    """One merge: the base, what is added, and the sums that become figures."""

    weights: Weights
    adapters: Sequence[Weighted]
    how: str
    settings: Settings
    dtype: torch.dtype | None = None
    lost: float = 0.0
    whole: float = 0.0
    used: set[Place] = field(default_factory=set)
    advance: Callable[[int, str], None] = lambda done, text: None

    def change(self, place: Place, weight: Tensor) -> Tensor | None:
        """What the adapters add to a layer; None if they leave it alone."""
        parts = [
            Part(item.adapter.updates[place], item.weight) for item in self.adapters if place in item.adapter.updates
        ]
        if not parts:
            return None
        self.used.add(place)
        # keep: with the weight at hand every method is a change written out, so every way of merging takes them all.
        written = [replace(part, update=_dense(part.update.delta(weight).reshape(weight.shape))) for part in parts]
        return DENSE[self.how](written, self.settings, place)

    def bias_change(self, place: Place, bias: Tensor) -> Tensor | None:
        """The same for its bias."""
        parts = [
            Part(_dense(change), item.weight)
            for item in self.adapters
            if place in item.adapter.updates and (change := item.adapter.updates[place].bias_delta(bias)) is not None
        ]
        return DENSE[self.how](parts, self.settings, (place[0], f"{place[1]}.bias")) if parts else None


def _dense(change: Tensor) -> Update:
    return Update("diff", {"diff": change})


def merge_into(  # noqa: PLR0913 - what the user chooses
    adapters: Sequence[Weighted],
    base: Path,
    target: Path,
    how: str,
    settings: Settings,
    reporter: Reporter,
    *,
    force: bool,
    names: Architecture | None = None,
    dtype: torch.dtype | None = None,
) -> IntoBase:
    """Write a copy of the base with the adapters in it, in the base's own layout.

    Args:
        base: a pipeline folder or a single-file checkpoint.
        target: new folder or file of the same kind.
        how: name in DENSE.
        force: keep the result although rounding took more than LARGEST_LOSS of the change.
        names: of the layers of a single file of no published size.
        dtype: number format of every weight; None keeps the base's own.

    Raises:
        ConfigError: if base and target are not of one kind, or the adapters are for another base.
        InterchangeError: if the base lacks a layer, a sum does not fit the number format, or rounding takes too much.
    """
    check_same_base(adapters)
    _check_target(base, target, how)
    staging = target.parent / f".merge-{os.getpid()}"
    result = IntoBase(target)
    with open_weights(base, names) as weights, storage.disk_errors(target):
        job = _Job(weights, adapters, how, settings, dtype)
        _check_fit(job)
        try:
            total = sum(len(tensors.header.tensors) for files in weights.files.values() for tensors in files)
            with reporter.progress("Merging into the base", total) as advance:
                job.advance = advance
                _write(job, base, staging / target.name, result)
            result.layers, result.lost = len(job.used), math.sqrt(job.lost / job.whole) if job.whole else 0.0
            if result.lost > LARGEST_LOSS and not force:
                raise InterchangeError(
                    f"Rounding would take {result.lost:.1%} of what the adapters change (limit {LARGEST_LOSS:.0%}): "
                    "the base's number format is too coarse for so small a change.",
                    ["write the model as --dtype fp32, use the adapter unmerged, or --force it."],
                )
            storage.publish(staging / target.name, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return result


def _check_target(base: Path, target: Path, how: str) -> None:
    problems = []
    if how not in DENSE:
        problems.append(f"--how {how} works on LoRA factors, which a base does not have; use {', '.join(DENSE)}.")
    if base.is_dir() and (target.suffix == ".safetensors" or target.is_file()):
        problems.append(f"{base} is a folder, so the result is a folder too; {target} looks like a file.")
    if not base.is_dir() and target.suffix != ".safetensors":
        problems.append(f"{base} is a single file, so the result is a file too; name it {target}.safetensors.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        problems.append(f"{target} already exists; choose a new name.")
    if problems:
        raise ConfigError("The adapters cannot be merged into the base this way:", problems)


def _check_fit(job: _Job) -> None:
    architecture = job.weights.architecture
    assert architecture is not None, "merging opens a base"
    other = [item for item in job.adapters if item.adapter.architecture.family != architecture.family]
    if other:
        raise ConfigError(
            f"The base is {architecture.title}.",
            [f"{item.path} is for {item.adapter.architecture.title}." for item in other],
        )
    words = [word for item in job.adapters for word in item.adapter.tokens]
    found = [problem for item in job.adapters for problem in job.weights.misfits(item.adapter.updates)]
    problems = list(dict.fromkeys(found))
    problems += [f"the learned word {word!r} would have to go into the tokenizer too." for word in words]
    if problems:
        raise InterchangeError("The adapters do not fit the base.", shortened(problems))


def _write(job: _Job, base: Path, target: Path, result: IntoBase) -> None:
    if not base.is_dir():
        _stream(job, "", job.weights.files[""][0], target)
        return
    streamed = set()
    for component, files in job.weights.files.items():
        for tensors in files:
            source = tensors.header.path
            streamed.add(source)
            _stream(job, component, tensors, target / _renamed(source.relative_to(base), job.dtype))
    for source in sorted(path for path in base.rglob("*") if path.is_file() and path not in streamed):
        if source.suffix in {".safetensors", ".bin", ".ckpt", ".pt"}:
            result.notes.append(f"{source.relative_to(base)} was left out: it is another copy of the weights.")
        else:
            copy = target / source.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            if job.dtype is not None and source.name == "config.json":
                _say_dtype(copy, job.dtype)


def _renamed(file: Path, dtype: torch.dtype | None) -> Path:
    """Without a variant in its name, such as `.fp16`, that is no longer true."""
    stem, _, variant = file.stem.rpartition(".")
    return file if dtype is None or DTYPES.get(variant, dtype) == dtype else file.with_name(stem + file.suffix)


def _say_dtype(config: Path, dtype: torch.dtype) -> None:
    """Make a network's configuration name the format that its weights have now; transformers loads them in it."""
    document = json.loads(config.read_bytes())
    stated = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in document}
    if stated:
        storage.write_json(config, document | stated)


def _stream(job: _Job, component: str, tensors: Tensors, path: Path) -> None:
    """Write one file of weights with the changes in it."""
    header = tensors.header
    empty = {
        name: torch.empty(
            entry.shape, dtype=COUNTS.get(entry.dtype) or job.dtype or STORED.get(entry.dtype), device="meta"
        )
        for name, entry in header.tensors.items()
    }
    unknown = {name for name, entry in header.tensors.items() if entry.dtype not in STORED | COUNTS}
    if unknown:
        raise InterchangeError(
            f"{header.path} uses number formats that cannot be merged into.", shortened(sorted(unknown))
        )
    places = _places(job, component, header)
    turned = {held.name for parts in job.weights.held.values() for held in parts if held.transposed}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(storage.safetensors_header(empty, _kept(header)))
        for number, name in enumerate(storage.tensor_order(empty)):
            changed = _changed(job, tensors, name, places.get(name, ()), name in turned)
            if changed is None and empty[name].dtype != (STORED | COUNTS)[header.tensors[name].dtype]:
                changed = _finite(read_tensor(tensors, name).to(empty[name].dtype), name)
            stream.write(tensors.raw(name) if changed is None else storage.tensor_bytes(changed))
            job.advance(number + 1, component)
        stream.flush()
        os.fsync(stream.fileno())


Rows = tuple[Place, int, int, int]
"""(layer, first row of the layer, row after the last, row of the tensor where they begin)."""


def _places(job: _Job, component: str, header: Header) -> dict[str, tuple[Rows, ...]]:
    """Name of a tensor -> the layers' rows it holds, for weights and biases."""
    found: dict[str, tuple[Rows, ...]] = {}
    for held in (held for parts in job.weights.held.values() for held in parts if held.tensors.header is header):
        rows, position = [], 0
        for piece in held.pieces:
            rows.append(((piece.component, piece.module), piece.start, piece.stop, position))
            position += piece.stop - piece.start
        found[held.name] = tuple(rows)
        found[held.name.removesuffix("weight") + "bias"] = tuple(rows)
    if component:
        for name, entry in header.tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "bias" and name not in found and entry.shape:
                found[name] = (((component, canonical_module(component, module)), 0, entry.shape[0], 0),)
    return found


def _changed(job: _Job, tensors: Tensors, name: str, rows: tuple[Rows, ...], turned: bool) -> Tensor | None:
    """The tensor with the changes in it, rounded once; None if nothing changes it.

    Args:
        turned: whether the file keeps the layer's rows as columns.
    """
    if not any(place in item.adapter.updates for place, *_ in rows for item in job.adapters):
        return None
    plain = read_tensor(tensors, name)
    plain = plain.T if turned else plain
    exact = plain.double()
    is_bias = name.endswith("bias")
    touched = False
    for place, first, last, position in rows:
        if is_bias:
            bias = job.weights.bias(place)
            change = None if bias is None else job.bias_change(place, bias)
        else:
            change = job.change(place, job.weights.weight(place))
        if change is not None:
            touched = True
            exact[position : position + last - first] += change[first:last]
    if not touched:
        return None
    rounded = _finite(exact.to(job.dtype or STORED[tensors.header.tensors[name].dtype]), name)
    wanted = exact - plain.double()
    job.lost += float((rounded.double() - exact).square().sum())
    job.whole += float(wanted.square().sum())
    return rounded.T.contiguous() if turned else rounded


def _finite(rounded: Tensor, name: str) -> Tensor:
    """The same tensor.

    Raises:
        InterchangeError: if a number lies beyond its format.
    """
    if not bool(torch.isfinite(rounded.float()).all()):
        raise InterchangeError(
            f"{name} would exceed its number format ({str(rounded.dtype).removeprefix('torch.')}).",
            ["use a smaller weight (file@0.5), or write the model as --dtype fp32."],
        )
    return rounded


def _kept(header: Header) -> dict[str, str]:
    """The base's own metadata but for hashes, which are of other bytes now."""
    return {key: value for key, value in header.metadata.items() if "hash" not in key} or {"format": "pt"}
