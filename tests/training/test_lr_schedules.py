"""The learning rate is a function of the step alone, never above the base rate and never wasted on zero."""

from __future__ import annotations

import math

import pytest

from finetune.config import OptimizerConfig
from finetune.training.lr_schedules import LR_SCHEDULES, Shape, factor, learning_rates

SHAPE = Shape()
FALLING = [name for name in LR_SCHEDULES if name not in ("constant", "cosine_restarts")]


def factors_of(name: str, total: int, warmup: int, floor: float = 0.0) -> list[float]:
    return [factor(name, step, total, warmup, SHAPE, floor) for step in range(total)]


RUNS = [(1, 0), (2, 1), (10, 0), (10, 3), (10, 9), (1000, 100), (777, 13)]


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), RUNS)
def test_rises_to_one_and_then_never_rises(name: str, total: int, warmup: int) -> None:
    """A factor outside (0, 1] is a step at a rate nobody asked for, or a wasted one."""
    factors = factors_of(name, total, warmup)
    assert all(0 < value <= 1 for value in factors)
    assert max(factors) == factors[warmup] == 1
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    if name != "cosine_restarts":
        assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_warmup_is_a_line_whose_first_step_moves(name: str) -> None:
    """Starting at rate 0 would waste the first step."""
    factors = factors_of(name, 100, 4)[:5]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("constant", 1.0),
        ("linear", 1 / 90),
        ("cosine", (1 - math.cos(math.pi / 90)) / 2),
        ("cosine_restarts", (1 - math.cos(math.pi / 30)) / 2),
        ("polynomial", 1 / 90**2),
        ("wsd", 1 - math.sqrt(17 / 18)),
        ("rex", (1 / 90) / (1 - 89 / 180)),
    ],
)
def test_last_step_is_as_documented(name: str, last: float) -> None:
    """A falling curve would reach 0 one step after the last one."""
    assert factor(name, 99, 100, 10, SHAPE) == pytest.approx(last, rel=1e-9)
    assert factor(name, 100, 100, 10, SHAPE) == pytest.approx(last if name == "constant" else 0.0, abs=1e-12)


def test_cosine_is_half_way_in_the_middle() -> None:
    """The published curve."""
    assert factor("cosine", 60, 110, 10, SHAPE) == pytest.approx(0.5)
    assert factor("linear", 60, 110, 10, SHAPE) == pytest.approx(0.5)


@pytest.mark.parametrize("name", FALLING)
def test_the_floor_is_where_curves_end(name: str) -> None:
    """A tenth of the rate to the end, for those who want their last steps to move."""
    assert factor(name, 100, 100, 10, SHAPE, floor=0.1) == pytest.approx(0.1)
    assert factors_of(name, 100, 10, floor=0.1)[10] == 1


def test_restarts_jump_back_as_often_as_asked() -> None:
    """Three cycles of equal length, each from full rate."""
    factors = factors_of("cosine_restarts", 90, 0)
    assert [step for step in range(1, 90) if factors[step] > factors[step - 1]] == [30, 60]
    assert factors[0] == factors[30] == factors[60] == 1


def test_wsd_is_stable_until_its_last_fifth() -> None:
    """The point of it: a run can be made longer at its stable part."""
    factors = factors_of("wsd", 110, 10)
    assert set(factors[10:91]) == {1.0} and factors[91] < 1


def test_equal_to_torch_and_diffusers() -> None:
    """Names mean the same everywhere: linear, polynomial and rising warm-up as in torch's own schedulers."""
    import torch
    from torch import nn, optim
    from torch.optim.lr_scheduler import PolynomialLR

    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = PolynomialLR(optimizer, total_iters=50, power=2.0)
    for step in range(50):
        assert factor("polynomial", step, 50, 0, SHAPE) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_warm_up_as_a_share_of_the_steps() -> None:
    """The same recipe at another length keeps its shape."""
    rate = learning_rates(OptimizerConfig(warmup_share=0.1, schedule="constant"), 50)
    assert [rate(step) for step in range(6)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
