"""What the denoiser is asked: noise levels, prediction, weighting and loss, all in (alpha, sigma).

Everything is a function of tensors that arrive; nothing here draws random numbers or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ConfigError, nearest

from .losses import LOSSES, mean_per_picture
from .predictions import PREDICTIONS
from .schedules import Schedule, from_config, is_flow
from .timesteps import DENSITIES, MODE_SCALE_RANGE, DensityParameters
from .weightings import WEIGHTINGS

__all__ = ["DENSITIES", "LOSSES", "PREDICTIONS", "WEIGHTINGS", "Objective", "Schedule", "build_objective"]


@dataclass(frozen=True, eq=False)
class Objective:
    """One training objective. Make it with `build_objective`, then move it once with `to`.

    Attributes:
        prediction: a name in PREDICTIONS.
        density: a name in DENSITIES; `density_parameters` shapes it.
        weighting: a name in WEIGHTINGS; min_snr reads `snr_gamma`, on the scale of the signal-to-noise ratio.
        loss_name: a name in LOSSES; huber and smooth_l1 read `huber_delta`, in units of the prediction.
    """

    schedule: Schedule
    prediction: str = "epsilon"
    density: str = "uniform"
    density_parameters: DensityParameters = field(default_factory=DensityParameters)
    weighting: str = "none"
    snr_gamma: float = 5.0
    loss_name: str = "mse"
    huber_delta: float = 0.1

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps for quantiles of shape (B,), in (0, 1): int64 for ddpm, float32 for flow."""
        return self.schedule.timesteps(DENSITIES[self.density](u, self.density_parameters))

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha * x_0 + sigma * noise in float32; latents of shape (B, ...), timesteps of shape (B,).
        """
        alpha, sigma = self._broadcast(timesteps, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser would answer; shape of `x0`."""
        return PREDICTIONS[self.prediction].target(x0, noise, *self._broadcast(timesteps, x0))

    def to_x0(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction implies; shape of `x_t`."""
        return PREDICTIONS[self.prediction].to_x0(prediction, x_t, *self._broadcast(timesteps, x_t))

    def weight(self, timesteps: Tensor) -> Tensor:
        """The weight of the prediction's own error at each timestep; shape (B,), float32."""
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        x0_gain = PREDICTIONS[self.prediction].x0_gain(alpha, sigma)
        return WEIGHTINGS[self.weighting].weight(alpha, sigma, x0_gain, self.snr_gamma)

    def loss(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Weighted loss per picture, shape (B,), float32; `mask` as in `losses.mean_per_picture`."""
        target = self.target(x0.float(), noise.float(), timesteps)
        errors = LOSSES[self.loss_name](prediction.float(), target, self.huber_delta)
        return mean_per_picture(errors, mask) * self.weight(timesteps)

    def to(self, device: torch.device | str) -> Objective:
        """The same objective with its tables on `device`."""
        return replace(self, schedule=self.schedule.to(device))

    def _broadcast(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.view(shape), sigma.view(shape)


def build_objective(  # noqa: PLR0913 - one keyword per field of the objective section
    scheduler_config: dict[str, Any],
    *,
    prediction: str | None = None,
    density: str = "uniform",
    density_mean: float = 0.0,
    density_std: float = 1.0,
    density_scale: float = 1.29,
    weighting: str = "none",
    snr_gamma: float = 5.0,
    loss: str = "mse",
    huber_delta: float = 0.1,
) -> Objective:
    """Join the base model's noise schedule with what the run asks for.

    Args:
        scheduler_config: the base's own `scheduler_config.json`. Without `prediction_type` it means epsilon,
            as in diffusers.
        prediction: None takes the base's own.

    Raises:
        ConfigError: on unknown names, numbers out of range and combinations that contradict each other; all
            at once.
    """
    schedule = from_config(scheduler_config)
    trained = "flow" if is_flow(scheduler_config) else scheduler_config.get("prediction_type") or "epsilon"
    objective = Objective(
        schedule=schedule,
        prediction=trained if prediction is None else prediction,
        density=density,
        density_parameters=DensityParameters(density_mean, density_std, density_scale),
        weighting=weighting,
        snr_gamma=snr_gamma,
        loss_name=loss,
        huber_delta=huber_delta,
    )
    problems = [problem for check in CHECKS for problem in check(objective, trained)]
    if problems:
        raise ConfigError("The objective cannot be trained:", problems)
    return objective


def _unknown_names(objective: Objective, trained: str) -> Iterable[str]:
    named: list[tuple[str, str, Iterable[str]]] = [
        ("prediction", objective.prediction, PREDICTIONS),
        ("density", objective.density, DENSITIES),
        ("weighting", objective.weighting, WEIGHTINGS),
        ("loss", objective.loss_name, LOSSES),
    ]
    for option, name, table in named:
        if name not in table:
            yield f"objective.{option} is {name!r}{nearest(name, table)}; choose one of {', '.join(table)}."


def _numbers_out_of_range(objective: Objective, trained: str) -> Iterable[str]:
    # "not x > 0" also catches NaN.
    shape = objective.density_parameters
    if objective.weighting == "min_snr" and not objective.snr_gamma > 0:
        yield f"objective.snr_gamma is {objective.snr_gamma}, so no picture would count; the paper uses 5."
    if objective.loss_name in ("huber", "smooth_l1") and not objective.huber_delta > 0:
        yield f"objective.huber_delta is {objective.huber_delta}, but it is a distance; 0.1 is usual."
    if objective.density == "logit_normal" and not shape.std > 0:
        yield f"objective.density_std is {shape.std}, but it is a width; 1 is usual."
    low, high = MODE_SCALE_RANGE
    if objective.density == "mode" and not low <= shape.scale <= high:
        yield f"objective.density_scale is {shape.scale}, where the curve folds; use {low} to {high:.4f}."


def _contradictions(objective: Objective, trained: str) -> Iterable[str]:
    kind = objective.schedule.kind
    prediction = PREDICTIONS.get(objective.prediction)
    weighting = WEIGHTINGS.get(objective.weighting)
    if prediction is not None and prediction.schedule != kind:
        yield (
            f"objective.prediction is {objective.prediction!r}, which is defined on a {prediction.schedule} "
            f"schedule, but the base model has a {kind} schedule; leave objective.prediction out to use "
            f"{trained!r}."
        )
    elif prediction is not None and objective.prediction != trained:
        yield (
            f"objective.prediction is {objective.prediction!r}, but the base model predicts {trained!r} and "
            "every sampler will read it so; leave objective.prediction out, or correct prediction_type in "
            "the base's scheduler/scheduler_config.json."
        )
    if objective.prediction == "epsilon" and kind == "ddpm" and objective.schedule.zero_terminal_snr:
        yield (
            "objective.prediction is 'epsilon', but the base's last timestep is pure noise "
            "(rescale_betas_zero_snr), where predicting the noise says nothing about the picture; a base "
            "with zero terminal SNR needs v_prediction or sample."
        )
    if weighting is not None and kind not in weighting.schedules:
        yield (
            f"objective.weighting is {objective.weighting!r}, which is defined on a "
            f"{' or '.join(weighting.schedules)} schedule, but the base model has a {kind} schedule; "
            "use none or min_snr."
        )
    if objective.density == "cosmap" and objective.weighting == "cosmap":
        yield (
            "objective.density and objective.weighting are both 'cosmap', so the same curve would count "
            "twice; set objective.weighting=none."
        )


CHECKS: tuple[Callable[[Objective, str], Iterable[str]], ...] = (
    _unknown_names,
    _numbers_out_of_range,
    _contradictions,
)
"""Each gets the objective and the base's own prediction, and yields what cannot be."""
