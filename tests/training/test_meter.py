"""Bad numbers are noticed, named, and judged against what is usual at their noise level."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from finetune.errors import NumericError
from finetune.training.meter import NEEDED, Meter, Policy, Usual
from finetune.training.step import StepResult


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def step_of(losses: list[float], quantiles: list[float], *, finite: bool = True) -> tuple[StepResult, list[Any]]:
    """A step whose pictures are called 0.png, 1.png, ..."""
    tensor = torch.tensor(losses)
    result = StepResult(tensor.mean(), torch.tensor(1.0), torch.tensor(finite), torch.tensor(0.0), (tensor,))
    batch = SimpleNamespace(
        quantiles=torch.tensor(quantiles),
        loss_weight=torch.ones(len(losses)),
        file_names=tuple(f"{i}.png" for i in range(len(losses))),
    )
    return result, [batch]


def names(step: int) -> list[str]:
    return ["0.png", "1.png"]


def test_means_over_the_steps_since_the_last_reading(accelerator) -> None:
    """What the log shows."""
    meter = Meter(accelerator, Policy())
    for number, loss in enumerate([1.0, 2.0, 3.0]):
        meter.add(number, *step_of([loss], [0.5]))
    reading = meter.read(names)
    assert reading.values["loss"] == pytest.approx(2.0) and reading.warnings == []
    meter.add(3, *step_of([7.0], [0.5]))
    assert meter.read(names).values["loss"] == pytest.approx(7.0)


def test_a_step_that_is_not_finite_stops_and_names_the_culprit(accelerator) -> None:
    """Of the pictures of the step, those whose own loss is not finite."""
    meter = Meter(accelerator, Policy())
    meter.add(0, *step_of([1.0, 1.0], [0.2, 0.8]))
    meter.add(1, *step_of([1.0, math.nan], [0.2, 0.8], finite=False))
    with pytest.raises(NumericError) as caught:
        meter.read(names)
    assert caught.value.exit_code == 6
    assert caught.value.headline.startswith("Step 2 gave a loss or gradient that is not finite; nothing")
    assert "its pictures were 0.png, 1.png; not finite were 1.png" in caught.value.problems[0]


def test_some_steps_that_are_not_finite_may_be_tolerated(accelerator) -> None:
    """Counted over the start, left out of the means, told each time; one more stops the run."""
    meter = Meter(accelerator, Policy(tolerate_nonfinite=1))
    meter.add(0, *step_of([2.0], [0.5]))
    meter.add(1, *step_of([math.inf], [0.5], finite=False))
    reading = meter.read(names)
    assert reading.values["loss"] == pytest.approx(2.0)
    assert "(1 of 1 tolerated)" in reading.warnings[0]
    meter.add(2, *step_of([math.nan], [0.5], finite=False))
    with pytest.raises(NumericError):
        meter.read(names)


def losses_at(usual: Usual, quantile: float, middle: float, count: int = 40) -> list[float | None]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(count, generator=generator).mul(0.3).exp()
    return [usual.excess(quantile, middle * float(factor)) for factor in spread]


def test_a_spike_is_one_for_its_noise_level_only() -> None:
    """0.8 is nothing special in much noise and alarming in little; a mean over both would see neither."""
    usual = Usual(8.0)
    assert not any(losses_at(usual, 0.05, 0.9)) and not any(losses_at(usual, 0.95, 0.004))
    assert usual.excess(0.05, 0.8) is None
    assert usual.excess(0.95, 0.8) == pytest.approx(200, rel=0.5)


def test_spikes_do_not_become_usual() -> None:
    """One bad picture that comes back every epoch is named every time."""
    usual = Usual(8.0)
    losses_at(usual, 0.5, 0.1)
    assert all(usual.excess(0.5, 30.0) for _ in range(100))


def test_nothing_is_judged_before_enough_is_seen() -> None:
    """The first steps of a run are no standard."""
    usual = Usual(8.0)
    assert [usual.excess(0.5, 10.0**i) for i in range(NEEDED)] == [None] * NEEDED


def judged(meter: Meter, steps: range) -> list[list[str]]:
    """What is said about steps of which every seventh holds a spike and every eleventh is not finite."""
    said = []
    for number in steps:
        losses = [0.1 + 0.01 * (number % 5), 60.0 if number % 7 == 0 else 0.3]
        meter.add(number, *step_of(losses, [0.5, 0.9], finite=number % 11 != 0))
        said.append(meter.read(names).warnings)
    return said


def test_a_resumed_run_judges_as_one_that_never_stopped(accelerator) -> None:
    """With on_spike=stop or a tolerance the judgement ends the run, so its memory is part of the checkpoint."""
    policy = Policy(tolerate_nonfinite=10)
    whole, first, second = (Meter(accelerator, policy) for _ in range(3))
    expected = judged(whole, range(80))
    assert sum(map(len, expected[30:])) >= 9, "nothing is judged, so nothing is shown"
    assert judged(first, range(30)) == expected[:30]
    second.load(json.loads(json.dumps(first.document())))
    assert judged(second, range(30, 80)) == expected[30:]
    assert second.document() == whole.document()


def test_an_older_checkpoint_without_memory_starts_without_one(accelerator) -> None:
    """It can be continued; the first steps are no standard, as in a new run."""
    meter = Meter(accelerator, Policy())
    meter.load({})
    assert meter.document() == Meter(accelerator, Policy()).document()


@pytest.mark.parametrize(("policy", "warned"), [("warn", True), ("stop", False), ("ignore", False)])
def test_what_to_do_about_a_spike_is_the_users_choice(accelerator, policy: str, warned: bool) -> None:
    """Warn by default; stop for those who watch nothing; silence for those who know."""
    meter = Meter(accelerator, Policy(on_spike=policy))
    for number in range(NEEDED):
        meter.add(number, *step_of([0.1, 0.1], [0.5, 0.9]))
    meter.read(names)
    meter.add(NEEDED, *step_of([0.1, 50.0], [0.5, 0.9]))
    if policy == "stop":
        with pytest.raises(NumericError, match=r"1\.png in step 17 \(500\.0 times\)"):
            meter.read(names)
        return
    warnings = meter.read(names).warnings
    assert bool(warnings) is warned
    assert not warned or "1.png in step 17 (500.0 times); look at these pictures" in warnings[0]
