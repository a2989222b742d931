"""Adapters of another rank, and adapters out of the difference of two models: both are truncated decompositions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.errors import counted
from finetune.errors import ConfigError
from finetune.interchange.adapter import Adapter, InterchangeError, Place, Update
from finetune.interchange.lossy import LOSSES, NOTABLE, Meter, noted
from finetune.interchange.lowrank import RankRule, decomposition, of_dense
from finetune.interchange.names import Architecture, from_base
from finetune.interchange.reading import shortened
from finetune.interchange.weights import PROJECTION, Weights, open_weights
from finetune.tracking import Reporter

SMALLEST_CHANGE = 1e-6
"""Largest |difference| of a weight below which a layer counts as unchanged: what saving in fp32 twice can do."""


@dataclass(frozen=True)
class Resized:
    """A truncated adapter.

    Attributes:
        kept: share of the whole change's Frobenius norm that is left.
        worst: the smallest share of a layer, and which.
        ranks: component -> rank -> how many layers have it.
        notes: what was left out.
    """

    adapter: Adapter
    kept: float
    worst: tuple[float, str]
    ranks: dict[str, Counter[int]]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        return [
            ("Kept", f"{self.kept:.2%} of the change; least in {self.worst[1]}: {self.worst[0]:.2%}"),
            *((f"Ranks, {component}", _distribution(counts)) for component, counts in self.ranks.items()),
            *(("Note", note) for note in self.notes),
        ]


def resize(adapter: Adapter, rule: RankRule, largest: int, reporter: Reporter) -> Resized:
    """The best approximation of every update at the rank that a rule gives it.

    Args:
        rule: from the singular values of an update to its rank.
        largest: no layer gets more.

    Raises:
        InterchangeError: for updates that are no change of a weight matrix, or need the base to be one.
    """
    problems = [
        f"{c}.{m} is {update.method}, which has no rank of its own."
        for (c, m), update in sorted(adapter.updates.items())
        if update.needs_base or "diff_b" in update.tensors or (update.method == "diff" and update.delta().ndim < 2)
    ]
    if problems:
        raise InterchangeError("Only low-rank updates of weights can be resized.", shortened(problems))
    sums = _Sums()
    result: dict[Place, Update] = {}
    with reporter.progress("Resizing", len(adapter.updates)) as advance:
        for number, (place, update) in enumerate(sorted(adapter.updates.items())):
            parts = decomposition(update, *place)
            rank = min(largest, max(1, rule(parts.s)))
            result[place] = parts.update(rank)
            sums.add(place, parts.squares, parts.kept(rank), result[place].rank or 1)
            advance(number + 1, "")
    return sums.resized(adapter.with_updates(result))


@dataclass(frozen=True)
class Extraction:
    """What to take from the difference of two models.

    Attributes:
        rule, largest: see `resize`.
        components: networks to look at; empty means all.
        convolutions: whether kernels wider than one pixel are taken too.
    """

    rule: RankRule
    largest: int
    components: tuple[str, ...] = ()
    convolutions: bool = True


def extract(
    tuned: Path, base: Path, wanted: Extraction, reporter: Reporter, names: Architecture | None = None
) -> Resized:
    """A LoRA of what training changed: the best approximation of W_tuned - W_base, layer by layer.

    Both models are read tensor by tensor; they may be pipeline folders or single files, not of the same kind.

    Args:
        names: of the layers of single files of no published size; a pipeline folder among the two names them too.

    Raises:
        ConfigError: if they are of several kinds or sizes, or a component does not exist.
        InterchangeError: if nothing differs.
    """
    folder = next((path for path in (base, tuned) if path.is_dir()), None)
    names = names or (from_base(folder) if folder else None)
    with open_weights(tuned, names) as new, open_weights(base, names) as old:
        places = _comparable(new, old, wanted)
        sums = _Sums()
        result: dict[Place, Update] = {}
        left_out = 0
        with reporter.progress("Extracting", len(places)) as advance:
            for number, place in enumerate(places):
                change = new.weight(place) - old.weight(place)
                if float(change.abs().max()) > SMALLEST_CHANGE:
                    if change.ndim < 2 or (not wanted.convolutions and change.ndim == 4 and change.shape[2:] != (1, 1)):
                        left_out += 1
                    else:
                        parts = of_dense(change, wanted.largest, *place)
                        rank = min(wanted.largest, max(1, wanted.rule(parts.s)))
                        result[place] = parts.update(rank)
                        sums.add(place, parts.squares, parts.kept(rank), result[place].rank or 1)
                advance(number + 1, ".".join(place)[:40])
        biases = _changed_biases(new, old, places)
    if not result:
        raise InterchangeError(f"{tuned} and {base} hold the same weights.", ["there is nothing to extract."])
    others = counted(left_out, "norm or convolution", "norms or convolutions")
    notes = [f"Left out, although they differ: {others}."] if left_out else []
    notes += [f"Left out, because a LoRA has none: {counted(biases, 'bias', 'biases')}."] if biases else []
    assert old.architecture is not None, "extracting opens a base"
    metadata = {"finetune.base": base.name, "finetune.extracted_from": tuned.name}
    return sums.resized(Adapter(result, old.architecture, metadata, "extracted"), tuple(notes))


class _Sums:
    """Figures over layers."""

    def __init__(self) -> None:
        self.lost = self.whole = 0.0
        self.worst = (1.0, "no layer")
        self.ranks: dict[str, Counter[int]] = {}
        self.meter = Meter()

    def add(self, place: Place, squares: float, kept: float, rank: int) -> None:
        self.meter.add(place, math.sqrt(squares * (1 - kept**2)), math.sqrt(squares))
        self.whole += squares
        self.lost += squares * (1 - kept**2)
        self.worst = min(self.worst, (kept, ".".join(place)))
        self.ranks.setdefault(place[0], Counter())[rank] += 1

    def resized(self, adapter: Adapter, notes: tuple[str, ...] = ()) -> Resized:
        kept = math.sqrt(max(0.0, 1 - self.lost / self.whole)) if self.whole else 1.0
        loss = self.meter.loss("a truncated rank")
        if loss.total > NOTABLE:
            adapter.metadata = adapter.metadata | {LOSSES: noted(adapter.metadata.get(LOSSES, ""), [loss])}
        return Resized(adapter, kept, self.worst, self.ranks, notes)


def _comparable(new: Weights, old: Weights, wanted: Extraction) -> list[Place]:
    assert new.architecture is not None and old.architecture is not None, "both are open"
    known = sorted({component for component, _ in old.held})
    problems = [f"there is no network {name!r}; there are {', '.join(known)}." for name in wanted.components
                if name not in known]  # fmt: skip
    if new.architecture.name != old.architecture.name:
        problems.append(f"one is {new.architecture.title}, the other {old.architecture.title}.")
    networks = set(old.architecture.networks) & set(wanted.components or known)
    places = [place for place in sorted(old.held) if place[0] in networks and place[1] in _layers(old, place[0])]
    unstored = {place for place in places if place not in new.held and _says_nothing(old, place)}
    places = [place for place in places if place not in unstored]
    missing = [place for place in places if place not in new.held]
    problems += [
        f"the original has no {'.'.join(place)}."
        for place in sorted(new.held)
        if place[0] in networks and place[1] == PROJECTION and place not in old.held and not _says_nothing(new, place)
    ]
    problems += [f"the tuned model has no {'.'.join(place)}." for place in missing]
    problems += [
        f"{'.'.join(place)} has the shape {new.shape(place)} and {old.shape(place)}."
        for place in places
        if place in new.held and new.shape(place) != old.shape(place)
    ]
    if problems:
        raise ConfigError("The two models cannot be compared layer by layer:", shortened(problems))
    return places


def _says_nothing(weights: Weights, place: Place) -> bool:
    """Whether a layer is a projection that changes nothing, which single files leave out."""
    if place[1] != PROJECTION:
        return False
    weight = weights.weight(place)
    return torch.equal(weight, torch.eye(*weight.shape))


def _layers(weights: Weights, component: str) -> set[str]:
    assert weights.architecture is not None, "it is open"
    return set(weights.architecture.networks[component].layers)


def _changed_biases(new: Weights, old: Weights, places: Sequence[Place]) -> int:
    """How many biases of these layers differ, however the two models' files name them."""
    count = 0
    for place in places:
        here, there = old.bias(place), new.bias(place)
        same = (here is None) == (there is None) and (here is None or there is None or torch.equal(here, there))
        count += not same
    return count


def _distribution(counts: Counter[int]) -> str:
    ordered = sorted(counts.items())
    if len(ordered) > 8:
        total = sum(counts.values())
        mean = sum(rank * count for rank, count in ordered) / total
        return f"{ordered[0][0]} to {ordered[-1][0]}, {mean:.1f} on average, {counted(total, 'layer')}"
    return ", ".join(f"{rank} ({counted(count, 'layer')})" for rank, count in ordered)
