"""How alike two adapters are, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import ConfigError
from finetune.interchange.adapter import Adapter, InterchangeError, Update
from finetune.interchange.inspection import block_order
from finetune.interchange.layouts import blocks
from finetune.interchange.lowrank import inner
from finetune.interchange.reading import read_adapter, shortened


@dataclass(frozen=True)
class Likeness:
    """Two adapters in one block.

    Attributes:
        cosine: of the angle between the two changes of all weights of the block; 1 same direction, 0 unrelated.
        ratio: Frobenius norm of the second over that of the first.
        both, only_first, only_second: numbers of layers.
    """

    component: str
    block: str
    cosine: float
    ratio: float
    both: int
    only_first: int
    only_second: int


@dataclass(frozen=True)
class Difference:
    """Two adapters as a whole, and block by block; the notes say what is not in the figures."""

    cosine: float
    ratio: float
    blocks: list[Likeness]
    notes: list[str] = field(default_factory=list)


def diff_adapters(first: Path, second: Path, base: Path | None = None) -> Difference:
    """Compare what two adapters do to their base.

    Raises:
        ConfigError: if they are for several kinds of base.
        InterchangeError: for updates whose change depends on the base's weights.
    """
    one, two = read_adapter(first, base, whole=False), read_adapter(second, base, whole=False)
    if one.architecture.name != two.architecture.name:
        raise ConfigError(
            "Adapters for different base models cannot be compared.",
            [f"{first} is for {one.architecture.title}, {second} for {two.architecture.title}."],
        )
    _refuse(one, two)
    sums: dict[tuple[str, str], list[float]] = {}
    for place in sorted(one.updates.keys() | two.updates.keys()):
        block = place[0], blocks([place[1]])[place[1]]
        left, right = one.updates.get(place), two.updates.get(place)
        row = sums.setdefault(block, [0.0] * 6)
        for number, value in enumerate(_products(left, right)):
            row[number] += value
        row[3] += left is not None and right is not None
        row[4] += right is None
        row[5] += left is None
    rows = [
        Likeness(component, block, *_figures(*row[:3]), *(int(count) for count in row[3:]))
        for (component, block), row in sums.items()
    ]
    rows.sort(key=lambda row: (row.component, block_order(row.block)))
    total = [sum(row[number] for row in sums.values()) for number in range(3)]
    words = ["learned words are not compared"] if one.tokens or two.tokens else []
    return Difference(*_figures(*total), rows, [*words, *one.left_out, *two.left_out])


def _products(left: Update | None, right: Update | None) -> tuple[float, float, float]:
    """(<l, l>, <r, r>, <l, r>)."""
    return (
        inner(left, left) if left else 0.0,
        inner(right, right) if right else 0.0,
        inner(left, right) if left and right else 0.0,
    )


def _figures(first: float, second: float, mixed: float) -> tuple[float, float]:
    """(cosine, ratio of norms)."""
    sizes = math.sqrt(max(first, 0.0)), math.sqrt(max(second, 0.0))
    cosine = mixed / (sizes[0] * sizes[1]) if all(sizes) else 0.0
    return max(-1.0, min(1.0, cosine)), sizes[1] / sizes[0] if sizes[0] else math.inf


def _refuse(*adapters: Adapter) -> None:
    problems = [
        f"{component}.{module} is {update.method}."
        for adapter in adapters
        for (component, module), update in sorted(adapter.updates.items())
        if update.needs_base
    ]
    if problems:
        raise InterchangeError(
            "These updates depend on the base's weights, so the files alone cannot be compared.", shortened(problems)
        )
