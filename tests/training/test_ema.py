"""The running mean is diffusers', lends its weights without leaving a trace, and survives a checkpoint."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn import Parameter

from finetune.errors import CheckpointError
from finetune.training.ema import Ema


def make_parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"unet.a": (3, 4), "unet.b": (7,), "text_encoder.c": (2, 2, 2)}
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def move(parameters: dict[str, Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_equals_diffusers(decay: float) -> None:
    """Same decays and same means over 100 steps; a step counted wrongly by one shows at once."""
    parameters = make_parameters()
    ema, theirs = Ema(parameters, decay), EMAModel(parameters.values(), decay=decay)
    for step in range(1, 101):
        move(parameters, step)
        ema.update(step)
        theirs.step(parameters.values())
        assert ema.decay_at(step) == theirs.cur_decay_value
        for mean, shadow in zip(ema.state().values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mean, shadow, rtol=1e-6, atol=1e-6)


def test_swapping_is_undone_to_the_bit_even_after_an_error() -> None:
    """Validation may fail; training must go on from the very same weights, at the same addresses."""
    parameters = make_parameters()
    ema = Ema(parameters, 0.9)
    for step in (1, 2, 3):
        move(parameters, step)
        ema.update(step)
    before = {name: (p.detach().clone(), p.data_ptr()) for name, p in parameters.items()}
    with pytest.raises(RuntimeError, match="validation failed"), ema.swapped():
        for name, parameter in parameters.items():
            assert torch.equal(parameter, ema.state()[name]) and not torch.equal(parameter, before[name][0])
        raise RuntimeError("validation failed")
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name][0]) and parameter.data_ptr() == before[name][1]
        assert parameter.requires_grad


def test_resume_is_bit_exact() -> None:
    """10 steps at once = 4, saved and loaded, + 6."""
    whole, first = make_parameters(), make_parameters()
    ema, interrupted = Ema(whole, 0.95), Ema(first, 0.95)
    for step in range(1, 11):
        move(whole, step)
        ema.update(step)
    for step in range(1, 5):
        move(first, step)
        interrupted.update(step)
    saved = {name: mean.clone() for name, mean in interrupted.state().items()}
    resumed = Ema(first, 0.95)
    resumed.load(saved)
    for step in range(5, 11):
        move(first, step)
        resumed.update(step)
    assert all(torch.equal(mean, resumed.state()[name]) for name, mean in ema.state().items())


def test_foreign_means_are_refused_and_nothing_is_loaded() -> None:
    """Missing, foreign and mis-shaped names come in one message."""
    ema = Ema(make_parameters(), 0.9)
    before = {name: mean.clone() for name, mean in ema.state().items()}
    foreign = {"unet.a": torch.zeros(3, 4), "unet.b": torch.zeros(8), "unet.z": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        ema.load(foreign)
    text = str(caught.value)
    assert "text_encoder.c is missing" in text and "unet.z is foreign" in text
    assert "unet.b has shape [8] instead of [7]" in text
    assert all(torch.equal(mean, before[name]) for name, mean in ema.state().items())
