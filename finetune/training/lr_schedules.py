"""The learning rate as a function of the step, and of nothing else: resuming needs no scheduler state.

Each curve gets the progress x in [0, 1) after warm-up and returns a factor in (0, 1] that begins at 1; `factor` adds
warm-up and the floor. Steps count from 0. During warm-up the factor is (step + 1) / (warmup_steps + 1), so the first
step already moves; step `warmup_steps` is the first at full rate. The step after the last, `total_steps`, would be at
the floor where a curve falls, so no step is wasted on a rate of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from finetune.config import OptimizerConfig


@dataclass(frozen=True)
class Shape:
    """What a curve looks like; each one reads what it needs.

    Attributes:
        cycles: cosine_restarts: falls from full rate to the end.
        power: polynomial: the power.
        decay: wsd: share of the steps after warm-up in which it falls; above 0.
    """

    cycles: int = 3
    power: float = 2.0
    decay: float = 0.2


def constant(x: float, shape: Shape) -> float:
    """1; the last step too."""
    return 1.0


def linear(x: float, shape: Shape) -> float:
    """1 - x; the last of n falling steps is at 1 / n."""
    return 1 - x


def cosine(x: float, shape: Shape) -> float:
    """(1 + cos(pi x)) / 2; the last of n falling steps is at about 2.5 / n^2.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts.
    """
    return (1 + math.cos(math.pi * x)) / 2


def cosine_restarts(x: float, shape: Shape) -> float:
    """cosine of the fractional part of cycles x: falls and jumps back to 1, `cycles` times.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, with cycles of equal length.
    """
    return cosine(x * shape.cycles % 1.0 if x < 1 else 1.0, shape)


def polynomial(x: float, shape: Shape) -> float:
    """(1 - x)^power."""
    return (1 - x) ** shape.power


def wsd(x: float, shape: Shape) -> float:
    """Warm-up, stable, decay: 1 until x = 1 - decay, then 1 - sqrt of the way from there.

    Source: Hu et al. 2024, MiniCPM, arXiv:2404.06395; the root as in Haegele et al. 2024, arXiv:2405.18392.
    """
    way = (x - (1 - shape.decay)) / shape.decay
    return 1 - math.sqrt(way) if way > 0 else 1.0


def rex(x: float, shape: Shape) -> float:
    """(1 - x) / (1 - x / 2): slower than linear at first, faster at the end.

    Source: Chen et al. 2021, REX, arXiv:2107.04197.
    """
    return (1 - x) / (1 - x / 2)


LR_SCHEDULES: dict[str, Callable[[float, Shape], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_restarts": cosine_restarts,
    "polynomial": polynomial,
    "wsd": wsd,
    "rex": rex,
}


def factor(name: str, step: int, total_steps: int, warmup: int, shape: Shape, floor: float = 0.0) -> float:
    """What the learning rate is multiplied by at `step`, from 0: in (0, 1]; the curve ends at `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    x = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return floor + (1 - floor) * LR_SCHEDULES[name](x, shape)


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps of warm-up, by whichever of the two fields is given."""
    return config.warmup_steps or int(config.warmup_share * total_steps)


def learning_rates(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """From the step to its factor, as a run asks for it."""
    shape = Shape(config.schedule_cycles, config.schedule_power, config.schedule_decay)
    warmup = warmup_steps(config, total_steps)
    return lambda step: factor(config.schedule, step, total_steps, warmup, shape, config.schedule_floor)
