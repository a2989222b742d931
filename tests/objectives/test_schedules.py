"""The noise schedule is the base model's own, to the last bit, as diffusers reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as diffusers_rescale
from diffusers.training_utils import compute_snr

from finetune.errors import ConfigError
from finetune.objectives import schedules

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "linear": {**SD15, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {**SD15, "beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {**SD15, "rescale_betas_zero_snr": True},
    "trained betas": {"trained_betas": torch.linspace(0.001, 0.02, 250).tolist(), "num_train_timesteps": 250},
    "short": {**SD15, "num_train_timesteps": 100},
}


def ddpm_of(config: dict[str, Any]) -> Any:
    known = {key: value for key, value in config.items() if key != "_class_name"}
    return DDPMScheduler(**known)


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_equal_diffusers(name: str) -> None:
    """A model is trained on exactly these levels; one bit off in the table is another model's schedule."""
    schedule = schedules.from_config(CONFIGS[name])
    scheduler = ddpm_of(CONFIGS[name])
    timesteps = torch.arange(schedule.num_timesteps)
    alpha, sigma = schedule.alpha_sigma(timesteps)
    assert torch.equal(alpha, scheduler.alphas_cumprod.sqrt())
    assert torch.equal(sigma, (1 - scheduler.alphas_cumprod).sqrt())
    torch.testing.assert_close(schedules.snr(alpha, sigma), compute_snr(scheduler, timesteps), rtol=0, atol=0)
    assert schedule.zero_terminal_snr == (name == "zero terminal SNR")


def test_rescaling_equals_diffusers() -> None:
    """Zero terminal SNR must end in exactly pure noise and keep the first level."""
    betas = schedules.scaled_linear_betas(0.00085, 0.012, 1000)
    rescaled = schedules.rescale_zero_terminal_snr(betas)
    assert torch.equal(rescaled, diffusers_rescale(betas))
    assert torch.cumprod(1 - rescaled, 0)[-1] == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_levels_equal_diffusers(shift: float) -> None:
    """Timestep T * i / T of the quantile grid must be the scheduler's own shifted sigma."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedules.from_config(dict(scheduler.config))
    s = torch.arange(1000, 0, -1) / 1000
    timesteps = schedule.timesteps(s)
    alpha, sigma = schedule.alpha_sigma(timesteps)
    torch.testing.assert_close(timesteps, scheduler.timesteps)
    torch.testing.assert_close(sigma, scheduler.sigmas)
    torch.testing.assert_close(alpha, 1 - scheduler.sigmas, rtol=0, atol=1e-6)


def test_dynamic_shifting_leaves_training_levels_alone() -> None:
    """Flux's shift depends on the picture's size and belongs to sampling."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert schedules.from_config(dict(scheduler.config)).shift == 1.0


def test_ddpm_timesteps_cover_every_level_once() -> None:
    """floor(s * T) of an even grid hits each timestep once; rounding at s = 1 must not leave the table."""
    schedule = schedules.from_config(SD15)
    s = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(schedule.timesteps(s), torch.arange(1000))
    edges = schedule.timesteps(torch.tensor([0.0, 1.0]))
    assert edges.tolist() == [0, 999] and edges.dtype == torch.int64


def test_everything_missing_is_listed_at_once() -> None:
    """A guessed noise schedule trains a useless adapter without any error."""
    with pytest.raises(ConfigError) as caught:
        schedules.from_config({"beta_schedule": "scaled_liner", "beta_end": 0.01})
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "beta_start is missing" in text and "num_train_timesteps is missing" in text
    assert "did you mean scaled_linear?" in text
