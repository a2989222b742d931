"""The step: loss scaling for fp16, and gradients that are not finite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from finetune.errors import NumericError
from finetune.training import step
from finetune.training.step import _move_parameters


def problem(scale=1.0, poison=None):
    """A parameter with a gradient of length 5 (times `scale`), its optimizer and a finite loss."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    parameter.grad = torch.tensor([3.0, 4.0]) * scale
    if poison is not None:
        parameter.grad[0] = poison
    return parameter, torch.optim.AdamW([parameter], lr=0.1), torch.tensor(1.0)


def scaler():
    """What accelerate uses for fp16, on the CPU; it knows its scale after the first scaled loss."""
    made = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    made.scale(torch.tensor(1.0))
    return made


def test_scaled_gradients_give_the_step_of_unscaled_ones():
    """fp16 training scales the loss; clipping and stepping must happen on the true gradient."""
    plain, optimizer, loss = problem()
    norm, _ = _move_parameters([plain], optimizer, None, 1.0, loss)
    scaled, optimizer, loss = problem(1024.0)
    scaled_norm, finite = _move_parameters([scaled], optimizer, scaler(), 1.0, loss)
    assert torch.equal(plain, scaled) and bool(finite)
    assert norm == pytest.approx(5.0) and scaled_norm == pytest.approx(5.0)


def test_an_overflow_in_fp16_is_skipped_and_lowers_the_scale():
    """It is routine at the start of an fp16 run: no step, no error, half the scale."""
    parameter, optimizer, loss = problem(1024.0, float("inf"))
    scaling = scaler()
    norm, finite = _move_parameters([parameter], optimizer, scaling, 1.0, loss)
    assert parameter.tolist() == [1.0, 2.0]
    assert bool(finite) and norm == 0.0
    assert scaling.get_scale() == 512.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_without_scaling_a_gradient_that_is_not_finite_is_reported(poison):
    """Garbage never reaches a parameter; the run stops at its next reading."""
    parameter, optimizer, loss = problem(poison=poison)
    _, finite = _move_parameters([parameter], optimizer, None, 1.0, loss)
    assert not bool(finite)
    assert torch.isfinite(parameter).all()


def test_a_parameter_without_a_gradient_stops_the_first_step():
    """A text encoder behind frozen embeddings once trained for nobody knows how many people: it never moved."""
    reached, unreached = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    batch = SimpleNamespace(images_in_step=1, loss_weight=torch.ones(1))
    asked = lambda batch: (reached.sum() ** 2)[None]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "batch_losses", lambda *arguments: asked(batch))
        with pytest.raises(NumericError) as caught:
            step.training_step(
                torch.nn.Identity(), None, [batch], {"unet.a": reached, "unet.b": unreached},
                torch.optim.SGD([reached, unreached], lr=0.1), Accelerator(cpu=True), 1.0,
            )  # fmt: skip
    assert caught.value.exit_code == 6 and caught.value.problems == ("unet.b",)
    assert reached.tolist() == [1.0, 1.0], "nothing moves before the check"


def test_another_question_adds_its_gradient_and_its_own_line():
    """The teacher's loss pulls in the same step and is not mixed into the loss of the pictures."""
    weight = torch.nn.Parameter(torch.ones(1))
    batch = SimpleNamespace(images_in_step=2, loss_weight=torch.tensor([1.0, 0.5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "batch_losses", lambda *arguments: weight * torch.tensor([2.0, 4.0]))
        result = step.training_step(
            torch.nn.Identity(), None, [batch], {"w": weight}, torch.optim.SGD([weight], lr=1.0),
            Accelerator(cpu=True), 100.0, lambda batch: weight * torch.tensor([6.0, 4.0]),
        )  # fmt: skip
    assert float(result.loss) == 2.0 and float(result.teacher) == 4.0
    assert float(result.grad_norm) == pytest.approx(6.0) and weight.item() == pytest.approx(-5.0)
    assert result.picture_losses[0].tolist() == [2.0, 4.0]
