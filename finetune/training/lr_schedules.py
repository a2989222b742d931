"""The learning rate as a function of the step, and of nothing else: resuming needs no scheduler state.

Each curve gets (step, total_steps, warmup_steps) and returns a factor in [0, 1] for the learning rate of that
step. Steps count from 0. During warm-up the factor is (step + 1) / (warmup_steps + 1), so the first step
already moves; step `warmup_steps` is the first at full rate. The step after the last, `total_steps`, would be
at 0 where a curve falls, so no step is wasted on a rate of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(step: int, total_steps: int, warmup_steps: int) -> float:
    """Full rate after warm-up; the last step too."""
    return _warmup(step, warmup_steps)


def linear(step: int, total_steps: int, warmup_steps: int) -> float:
    """A straight line from 1 to 0 after warm-up; the last of n falling steps is at 1 / n."""
    return _warmup(step, warmup_steps) * (1 - _progress(step, total_steps, warmup_steps))


def cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """(1 + cos(pi x)) / 2 for x from 0 to 1 after warm-up; the last of n falling steps is at about 2.5 / n^2.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts.
    """
    progress = _progress(step, total_steps, warmup_steps)
    return _warmup(step, warmup_steps) * (1 + math.cos(math.pi * progress)) / 2


LR_SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the way from the first step at full rate to the end, in [0, 1]; 0 during warm-up."""
    falling = max(1, total_steps - warmup_steps)
    return min(1.0, max(0, step - warmup_steps) / falling)
