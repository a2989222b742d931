"""The step: loss scaling for fp16, and gradients that are not finite."""

from __future__ import annotations

import pytest
import torch

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
