"""What the steps measured: kept on the device, read at the next line of the log, and judged there.

Two things are judged. A loss or gradient that is not finite: the step did not move a parameter by it, and the run
stops, naming the pictures. And a picture whose loss is far above what is usual *at its noise level*: a spike. The loss
of a diffusion model spans three orders of magnitude over noise levels, so a spike in the mean says little; here each
picture's loss is compared with the recent losses in the same tenth of the noise levels, in the logarithm, by median
and median absolute deviation, which the spike itself cannot move.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from finetune.data.batch import Batch
from finetune.errors import NumericError
from finetune.training.step import StepResult

BANDS = 10
REMEMBERED = 64
"""Losses that each band compares with."""
NEEDED = 16
"""A band judges once it has seen this many."""
SMALLEST_DEVIATION = 0.1
"""In the logarithm of the loss; a tenth is what one picture differs from itself by its noise alone."""
NAMED = 5
"""Pictures named in one message."""


@dataclass(frozen=True)
class Policy:
    """What to do about numbers that are wrong; fields of `TrainConfig` under the same names."""

    on_spike: str = "warn"
    spike_deviations: float = 8.0
    tolerate_nonfinite: int = 0


@dataclass(frozen=True)
class Reading:
    """Means over the steps since the last reading, and what there is to warn of."""

    values: dict[str, float]
    warnings: list[str]


@dataclass(frozen=True)
class _Step:
    """One step, its tensors still on the device."""

    number: int
    row: Tensor
    losses: Sequence[Tensor]
    quantiles: Sequence[Tensor]
    weights: Sequence[Tensor]
    names: Sequence[tuple[str, ...]]


class _Asked(NamedTuple):
    """One picture of one step, at the noise level it was asked at."""

    step: int
    quantile: float
    name: str
    loss: float


@dataclass
class Usual:
    """What a loss usually is at each noise level."""

    deviations: float
    seen: list[deque[float]] = field(default_factory=lambda: [deque(maxlen=REMEMBERED) for _ in range(BANDS)])

    def excess(self, quantile: float, loss: float) -> float | None:
        """How many times the usual loss this one is, if that is a spike; else it is remembered."""
        band = self.seen[min(BANDS - 1, int(quantile * BANDS))]
        value = math.log(max(loss, 1e-12))
        if len(band) >= NEEDED:
            middle = statistics.median(band)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in band)
            if value - middle > self.deviations * max(spread, SMALLEST_DEVIATION):
                return math.exp(value - middle)
        band.append(value)
        return None


class Meter:
    """Takes in steps without reading them, and gives means and judgements when asked.

    Every process judges the pictures of all, in one order, so all come to the same decision, and what they compare
    with is one and the same for a checkpoint.
    """

    def __init__(self, accelerator: Accelerator, policy: Policy) -> None:
        self.detail = ""
        """A few words for the progress line."""
        self._accelerator = accelerator
        self._policy = policy
        self._usual = Usual(policy.spike_deviations)
        self._tolerated = 0
        self._steps: list[_Step] = []
        self.start()

    def start(self) -> None:
        """The time of the next step begins now."""
        self._started = time.perf_counter()

    def document(self) -> dict[str, Any]:
        """For a checkpoint; all steps must have been read."""
        assert not self._steps, f"{len(self._steps)} steps were not judged yet"
        return {"tolerated": self._tolerated, "usual": [list(band) for band in self._usual.seen]}

    def load(self, document: dict[str, Any]) -> None:
        """Put back what `document` gave; an empty one, of an older checkpoint, leaves a start without memory."""
        self._tolerated = document.get("tolerated", 0)
        for band, losses in zip(self._usual.seen, document.get("usual", []), strict=False):
            band.extend(losses)

    def add(self, number: int, result: StepResult, batches: Sequence[Batch]) -> None:
        """Take in one step's result, counted from 0, without waiting for the device."""
        row = torch.stack([result.loss, result.grad_norm, (~result.finite).float(), result.teacher])
        self._steps.append(
            _Step(
                number, row, result.picture_losses, [b.quantiles for b in batches], [b.loss_weight for b in batches],
                [b.file_names for b in batches],
            )
        )  # fmt: skip

    def read(self, names: Callable[[int], list[str]]) -> Reading:
        """Judge and average the steps since the last reading.

        Args:
            names: file names of all pictures of a step, over all processes.

        Raises:
            NumericError: for a step that is not finite beyond those tolerated, or for a spike if the policy is to stop.
        """
        rows = torch.stack([step.row for step in self._steps])
        # keep: a mean over processes carries a NaN of one to all of them, so that all stop together.
        rows = self._accelerator.reduce(rows, "mean").cpu()
        bad = [i for i, row in enumerate(rows) if row[2] > 0 or not torch.isfinite(row[0])]
        warnings = self._not_finite(bad, names) if bad else []
        if self._policy.on_spike != "ignore":
            warnings += self._spikes([step for i, step in enumerate(self._steps) if i not in bad])
        self._require_scale()
        good = rows[[i for i in range(len(rows)) if i not in bad]]
        loss, norm, _, teacher = good.mean(0).tolist() if len(good) else [math.nan] * 4
        values = {"loss": loss, "grad_norm": norm}
        values["seconds_per_step"] = (time.perf_counter() - self._started) / len(self._steps)
        if any(row[3] > 0 for row in good):
            values["teacher_loss"] = teacher
        if not len(good):
            values = {"seconds_per_step": values["seconds_per_step"]}
        self._steps = []
        self.start()
        return Reading(values, warnings)

    def _require_scale(self) -> None:
        """fp16 skips a step whose scaled gradient overflows and halves the scale, which must come to an end."""
        scaler = self._accelerator.scaler
        if scaler is not None and scaler.get_scale() < 1:
            raise NumericError(
                "The gradient overflows in fp16 in every step, however little the loss is scaled: nothing is learned.",
                [
                    "lower optimizer.learning_rate, or train another run with model.dtype=fp32, or with bf16 where the "
                    "GPU computes in it"
                ],
            )

    def _not_finite(self, bad: Sequence[int], names: Callable[[int], list[str]]) -> list[str]:
        self._tolerated += len(bad)
        first = self._steps[bad[0]]
        what = f"Step {first.number + 1} gave a loss or gradient that is not finite"
        pictures = f"its pictures were {', '.join(names(first.number))}"
        if culprits := [asked.name for asked in self._everywhere([first]) if not math.isfinite(asked.loss)]:
            pictures += f"; not finite were {', '.join(culprits)}"
        if self._tolerated <= self._policy.tolerate_nonfinite:
            return [
                f"{what}; its gradient counted as zero ({self._tolerated} of {self._policy.tolerate_nonfinite} "
                f"tolerated); {pictures}"
            ]
        raise NumericError(
            f"{what}; nothing of it was applied or saved.",
            [
                pictures,
                "a lower optimizer.learning_rate or model.dtype=bf16 or fp32 usually helps; the same command goes on "
                "from the last checkpoint",
            ],
        )

    def _spikes(self, steps: Sequence[_Step]) -> list[str]:
        found = []
        for asked in self._everywhere(steps):
            excess = self._usual.excess(asked.quantile, asked.loss)
            if excess is not None:
                found.append(f"{asked.name} in step {asked.step + 1} ({excess:.1f} times)")
        if not found:
            return []
        named = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
        text = f"The loss was far above what is usual at its noise level: {named}"
        if self._policy.on_spike == "stop":
            raise NumericError(
                f"{text}.",
                [
                    "look at these pictures and their captions; a lower optimizer.learning_rate helps when it grows "
                    "from step to step",
                    "train.on_spike=warn goes on from the last checkpoint with a warning",
                ],
            )
        return [f"{text}; look at these pictures and their captions"]

    def _everywhere(self, steps: Sequence[_Step]) -> list[_Asked]:
        """The pictures of these steps over all processes, in an order that does not know of processes."""
        asked = _pictures(steps)
        if self._accelerator.num_processes > 1:
            asked = gather_object(asked)
        return sorted(asked)


def _pictures(steps: Sequence[_Step]) -> list[_Asked]:
    """This process's pictures that count, with their loss before its weight."""
    parts = [losses for step in steps for losses in step.losses]
    # keep: all at once, for each copy from the device waits for it.
    left = iter(torch.cat(parts).tolist() if parts else ())
    rows = []
    for step in steps:
        for quantiles, weights, names in zip(step.quantiles, step.weights, step.names, strict=True):
            values = zip(names, quantiles.tolist(), left, weights.tolist(), strict=False)
            rows += [_Asked(step.number, quantile, name, loss) for name, quantile, loss, weight in values if weight > 0]
    return rows
