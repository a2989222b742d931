"""The learning rate is a function of the step alone, never above the base rate and never wasted on zero."""

from __future__ import annotations

import math

import pytest

from finetune.training.lr_schedules import LR_SCHEDULES

RUNS = [(1, 0), (2, 1), (10, 0), (10, 3), (10, 9), (1000, 100), (777, 13)]


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), RUNS)
def test_rises_to_one_and_then_never_rises(name: str, total: int, warmup: int) -> None:
    """A factor outside (0, 1] is a step at a rate nobody asked for, or a wasted one."""
    factors = [LR_SCHEDULES[name](step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == factors[warmup] == 1
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_warmup_is_a_line_whose_first_step_moves(name: str) -> None:
    """Starting at rate 0 would waste the first step."""
    factors = [LR_SCHEDULES[name](step, 100, 4) for step in range(5)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("name", "last"),
    [("constant", 1.0), ("linear", 1 / 90), ("cosine", (1 - math.cos(math.pi / 90)) / 2)],
)
def test_last_step_is_as_documented(name: str, last: float) -> None:
    """A falling curve would reach 0 one step after the last one."""
    assert LR_SCHEDULES[name](99, 100, 10) == pytest.approx(last, rel=1e-9)
    assert LR_SCHEDULES[name](100, 100, 10) == pytest.approx(last if name == "constant" else 0.0, abs=1e-12)


def test_cosine_is_half_way_in_the_middle() -> None:
    """The published curve."""
    assert LR_SCHEDULES["cosine"](60, 110, 10) == pytest.approx(0.5)
    assert LR_SCHEDULES["linear"](60, 110, 10) == pytest.approx(0.5)
