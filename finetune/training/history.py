"""The validations of a run so far: which was the best, and whether it still gets better. Saved in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.training.validation import Ratio


@dataclass(frozen=True)
class Validated:
    """One validation.

    Attributes:
        step: optimizer steps before it.
        value: loss over the base model's.
        error: its standard error; None if unknown.
    """

    step: int
    value: float
    error: float | None


class History:
    """Validations in the order of their steps, without the one of the untrained adapter."""

    def __init__(self, min_improvement: float, validated: list[Validated] | None = None) -> None:
        self._min_improvement = min_improvement
        self._validated = validated or []

    def add(self, step: int, ratio: Ratio) -> bool:
        """Take in a validation; whether it is the best so far. One of the same step replaces the earlier."""
        self._validated = [old for old in self._validated if old.step < step]
        self._validated.append(Validated(step, ratio.value, ratio.error))
        best = self.best()
        return best is not None and best.step == step

    def best(self) -> Validated | None:
        """The validation with the lowest ratio; one counts as lower only by more than `min_improvement`."""
        best: Validated | None = None
        for one in self._validated:
            if best is None or one.value < best.value - self._min_improvement:
                best = one
        return best

    def last(self) -> Validated | None:
        """The newest validation."""
        return self._validated[-1] if self._validated else None

    def stale(self) -> int:
        """How many validations there were since the best."""
        best = self.best()
        return sum(one.step > best.step for one in self._validated) if best else 0

    def document(self) -> dict[str, Any]:
        """For a checkpoint."""
        best = self.best()
        rows = [[one.step, one.value, one.error] for one in self._validated]
        return {"validated": rows, "best": best.step if best else None}

    def load(self, document: dict[str, Any], step: int) -> None:
        """Put back what `document` gave, up to optimizer step `step`."""
        rows = document.get("validated", [])
        self._validated = [Validated(*row) for row in rows if row[0] <= step]
