"""From one layout to another: exact or refused, proven by reading the new file back before it gets its name."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_tools.errors import counted
from finetune import storage
from finetune.dtypes import DTYPES, ROUNDING
from finetune.errors import ConfigError
from finetune.interchange.adapter import Adapter, InterchangeError, Place, Update
from finetune.interchange.embeddings import words_folder
from finetune.interchange.lossy import LOSSES, Loss, Meter, everything, need_base, noted, reading_losses
from finetune.interchange.lowrank import distance, of_dense
from finetune.interchange.names import Architecture, table_of
from finetune.interchange.output import Output, add_words
from finetune.interchange.reading import adapter_from
from finetune.interchange.sources import open_sources
from finetune.interchange.weights import Weights, open_weights
from finetune.interchange.writing import WRITERS
from finetune.tracking import Reporter

DEFAULT_RANK = 64
"""Rank of a LoRA that stands in for another method, unless one is named."""


@dataclass(frozen=True)
class Conversion:
    """A file that was written and read back.

    Attributes:
        layers: how many layers it changes.
        worst: largest relative difference of a layer's change between what was read and what was written, as the new
            file is read back; Frobenius norms.
        worst_layer: where that is.
        losses: what approximation cost, as measured and as the file's metadata tell; empty for exact conversions.
        notes: what was approximated or left out.
    """

    path: Path
    layout: str
    layers: int
    worst: float
    worst_layer: str
    losses: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        exact = "exact" if self.worst == 0 else f"within {self.worst:.1e} per layer ({self.worst_layer})"
        return [
            ("Written", f"{self.path} ({self.layout} layout)"),
            ("Read back", f"{counted(self.layers, 'layer')}, {exact}"),
            *(loss.row() for loss in self.losses),
            *(("Note", note) for note in self.notes),
        ]


def write(
    adapter: Adapter,
    target: Path,
    *,
    to: str,
    dtype: str = "",
    base: Path | None = None,
    allow_lossy: bool = False,
    rank: int = DEFAULT_RANK,
    reporter: Reporter | None = None,
) -> Conversion:
    """Write an adapter in a layout and prove it by reading it back.

    Args:
        target: the new file; a folder for "peft". Replaced if it exists.
        to: name in WRITERS.
        dtype: "fp32", "fp16" or "bf16"; empty means the widest that the source holds.
        base: the base; a pipeline folder is needed for bases of no published size, and a folder or a single file to
            measure what is lost of methods whose change depends on the weights.
        allow_lossy: write even what the layout cannot say exactly; the loss is measured, told, and written into the
            file under `lossy.LOSSES`.
        rank: of the LoRA that then stands in for another method.

    Raises:
        InterchangeError: if the layout cannot say what the adapter does; all reasons.
        StorageError: if the disk refuses.
    """
    check_spelling(adapter, to)
    number_format = DTYPES[dtype] if dtype else adapter.dtype
    number_format = torch.float32 if to == "ours" or number_format == torch.float64 else number_format
    wanted = adapter
    losses: list[Loss] = []
    several = " and ".join(adapter.candidates)
    notes = (
        [f"it fits {several} equally well; {adapter.candidates[0]} is assumed (choose with --base)."] if several else []
    )
    notes += [f"left out: {word}" for word in adapter.left_out]
    try:
        written = WRITERS[to](adapter, number_format, False)
    except InterchangeError:
        if not allow_lossy:
            raise
        with open_weights(base) as weights:
            wanted, losses, more = _lossy(adapter, to, rank, weights, reporter or Reporter())
        notes += more
        written = WRITERS[to](wanted, number_format, True)
    if to != "ours":
        add_words(written, adapter, "embeddings" if to == "peft" else words_folder(target))
    if losses:
        for _, metadata in written.files.values():
            metadata[LOSSES] = noted(adapter.metadata.get(LOSSES, ""), losses)
    job = _Job(wanted, written, target, to, number_format, table_of(base) or adapter.architecture)
    worst, worst_layer, layers = _publish(job)
    return Conversion(target, to, layers, worst, worst_layer, losses, [*notes, *written.notes])


def check_spelling(adapter: Adapter, to: str) -> None:
    """Refuse to guess how a layout spells layers.

    Raises:
        ConfigError: if that depends on the base, and the base is not known.
    """
    if adapter.guessed and to == "kohya":
        raise ConfigError(
            "The adapter's base is not a published model, and the kohya layout names layers by the base's family.",
            ["give the pipeline folder of its base with --base (demo: the embedded base)."],
        )


def _lossy(
    adapter: Adapter, to: str, rank: int, weights: Weights, reporter: Reporter
) -> tuple[Adapter, list[Loss], list[str]]:
    """(what can be written, what that costs, in words): the adapter itself if only its readers differ."""
    try:
        WRITERS[to](adapter, torch.float32, True)
    except InterchangeError:
        return approximated(adapter, rank, weights, reporter)
    return adapter, reading_losses(adapter, weights, reporter), []


def approximated(
    adapter: Adapter, rank: int, weights: Weights, reporter: Reporter
) -> tuple[Adapter, list[Loss], list[str]]:
    """The adapter with a LoRA in place of every update that is none, what that costs, and what is left out.

    Raises:
        InterchangeError: if the base is needed and not there.
    """
    need_base(adapter.updates, weights)
    result: dict[Place, Update] = {}
    meter, left_out, biases = Meter(), 0, 0
    with reporter.progress("Approximating", len(adapter.updates)) as advance:
        for number, (place, update) in enumerate(sorted(adapter.updates.items())):
            if update.is_low_rank and "diff_b" not in update.tensors:
                result[place] = update
            else:
                wanted = everything(update, place, weights)
                found = [torch.zeros_like(change) for change in wanted]
                biases += len(wanted) > 1
                if wanted[0].ndim >= 2:
                    result[place] = of_dense(wanted[0], rank, *place).update(rank)
                    found[0] = result[place].delta().reshape(wanted[0].shape)
                else:
                    left_out += 1
                meter.compare(place, wanted, found)
            advance(number + 1, "")
    loss = meter.loss(f"as a LoRA of rank {rank}")
    layers = counted(loss.layers, "layer is", "layers are")
    notes = [f"{layers} written as a LoRA of rank {rank} in place of another method."]
    notes += [f"changes of {counted(biases, 'bias', 'biases')} are left out."] * bool(biases)
    notes += [f"changes of {counted(left_out, 'norm')} are left out."] * bool(left_out)
    return adapter.with_updates(result), [loss], notes


@dataclass(frozen=True)
class _Job:
    """What is written where, and by which names it is read back."""

    wanted: Adapter
    written: Output
    target: Path
    to: str
    dtype: torch.dtype
    names: Architecture


OWN_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
"""Files of a PEFT folder; learned words add .safetensors files in folders of their own."""


def _refuse_other_folder(folder: Path) -> None:
    """A folder is replaced whole, so it must hold nothing but what a conversion writes."""
    if not folder.is_dir():
        return
    own = [path for path in folder.rglob("*") if path.is_file()]
    words = folder.name.endswith("embeddings")
    foreign = [
        path for path in own
        if path.name not in OWN_FILES
        and not (path.suffix == ".safetensors" and (words or path.parent.name == "embeddings"))
    ]  # fmt: skip
    if foreign:
        raise ConfigError(
            f"{folder} contains other files and would be replaced completely.",
            [f"it holds {foreign[0].relative_to(folder)}; name a new folder."],
        )


def _publish(job: _Job) -> tuple[float, str, int]:
    """Write beside, read back, compare, rename; (largest relative difference, where, number of layers)."""
    target = job.target
    for folder in (target, target.parent / words_folder(target)):
        _refuse_other_folder(folder)
    staging = target.parent / f".convert-{os.getpid()}"
    beside = staging / target.name
    try:
        with storage.disk_errors(target):
            job.written.save(beside)
            back = adapter_from(beside, open_sources(beside, job.names))
            worst, worst_layer, _ = compare(job.wanted, back)
            limit = ROUNDING[job.dtype]
            if not worst <= limit:
                raise InterchangeError(
                    f"{target} was not kept: read back, it differs by {worst:.1e} from the source.",
                    [f"{worst_layer} differs most (at most {limit:.0e}); write it with --dtype fp32, or report this."],
                )
            for companion in (staging / words_folder(target), beside):
                if companion.exists():
                    storage.publish(companion, target.parent / companion.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return worst, worst_layer, len(back.updates)


def compare(adapter: Adapter, other: Adapter) -> tuple[float, str, float]:
    """(largest relative difference of a layer, where, relative difference of everything); a missing layer counts 1."""
    worst, worst_layer = 0.0, ""
    lost = whole = 0.0
    for place in sorted(adapter.updates.keys() | other.updates.keys()):
        if place not in adapter.updates or place not in other.updates:
            only = adapter.updates.get(place) or other.updates[place]
            difference = size = 1.0 if only.needs_base else float(only.delta().norm())
        else:
            difference, size = distance(adapter.updates[place], other.updates[place])
        relative = difference / size if size else float(difference > 0)
        if not relative <= worst:
            worst, worst_layer = relative, ".".join(place)
        lost, whole = lost + difference**2, whole + size**2
    for word in adapter.tokens.keys() | other.tokens.keys():
        ours, theirs = adapter.tokens.get(word, {}), other.tokens.get(word, {})
        if set(ours) != set(theirs) or any(not torch.equal(ours[c], theirs[c]) for c in ours):
            return math.inf, f"the word {word}", math.inf
    return worst, worst_layer, math.sqrt(lost / whole) if whole else 0.0
