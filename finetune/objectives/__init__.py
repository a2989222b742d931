"""What the denoiser is asked: noise levels, prediction, weighting and loss, all in (alpha, sigma).

Everything is a function of tensors that arrive; nothing here draws random numbers or waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from finetune.by_path import source_digest
from finetune.errors import ConfigError, nearest

from . import own
from .losses import DELTA_SCHEDULES, LOSSES, WITH_DELTA, mean_per_picture
from .noise import WHITE, NoiseShape, draw_noise, perturbed
from .predictions import PREDICTIONS
from .schedules import Schedule, from_config, is_flow
from .timesteps import DENSITIES, MODE_SCALE_RANGE, DensityParameters, shifted, squeezed
from .weightings import WEIGHTINGS, WeightParameters

__all__ = [
    "DELTA_SCHEDULES",
    "DENSITIES",
    "LOSSES",
    "PREDICTIONS",
    "WEIGHTINGS",
    "WHITE",
    "NoiseShape",
    "Objective",
    "Schedule",
    "build_objective",
    "draw_noise",
    "perturbed",
]


LEVELS: Mapping[str, Any] = {"density": "uniform", "density_shift": 1.0, "noise_range": (0.0, 1.0)}
"""Which noise levels the plain question asks: all of them alike."""
PLAIN: Mapping[str, Any] = {**LEVELS, "weighting": "none", "loss_name": "mse", "huber_schedule": "constant"}
"""The question that runs of different objectives can be compared by: the squared error, nothing weighted."""


@dataclass(frozen=True, eq=False)
class Objective:
    """One training objective. Make it with `build_objective`, then move it once with `to`.

    Attributes:
        prediction: a name in PREDICTIONS.
        density: a name in DENSITIES, or the import path of an own function; `density_parameters` shapes it.
        density_shift: pushes the density towards noise (above 1) or clean pictures, besides the schedule's own shift.
        noise_range: the part of the noise levels that is trained, as shares of T; 0 is clean.
        weighting: a name in WEIGHTINGS, or an import path; `weight_parameters` shapes it.
        loss_name: a name in LOSSES, or an import path; those in WITH_DELTA read `huber_delta`, in units of the
            prediction.
        huber_schedule: a name in DELTA_SCHEDULES: how that delta follows the noise level.
        own: the functions of the user's own, by import path; what their files said when this was built.
    """

    schedule: Schedule
    prediction: str = "epsilon"
    density: str = "uniform"
    density_parameters: DensityParameters = field(default_factory=DensityParameters)
    density_shift: float = 1.0
    noise_range: tuple[float, float] = (0.0, 1.0)
    weighting: str = "none"
    weight_parameters: WeightParameters = field(default_factory=WeightParameters)
    loss_name: str = "mse"
    huber_delta: float = 0.1
    huber_schedule: str = "constant"
    own: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps for quantiles of shape (B,), in (0, 1): int64 for ddpm, float32 for flow."""
        s = self.levels(u)
        if self.density_shift != 1:
            s = shifted(s, self.density_shift)
        if self.noise_range != (0, 1):
            s = squeezed(s, self.noise_range)
        return self.schedule.timesteps(s)

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
        known = WEIGHTINGS.get(self.weighting)
        weigh = known.weight if known else self.own[self.weighting]
        return weigh(alpha, sigma, x0_gain, self.weight_parameters)

    def loss(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Weighted loss per picture, shape (B,), float32; `mask` as in `losses.mean_per_picture`."""
        return self.distance(prediction, self.target(x0.float(), noise.float(), timesteps), timesteps, mask)

    def distance(self, prediction: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """`loss` against any target, such as another model's prediction; shape (B,), float32."""
        delta = self._delta(timesteps, prediction.ndim)
        measure = LOSSES.get(self.loss_name) or self.own[self.loss_name]
        errors = measure(prediction.float(), target, delta)
        return mean_per_picture(errors, mask) * self.weight(timesteps)

    def to(self, device: torch.device | str) -> Objective:
        """The same objective with its tables on `device`."""
        return replace(self, schedule=self.schedule.to(device))

    def plain(self) -> Objective | None:
        """The plain question of this schedule and prediction, or None where this is it."""
        return replace(self, **PLAIN) if self._differs(PLAIN) else None

    def asks_plain_levels(self) -> bool:
        """Whether the same quantiles mean the same timesteps as in the plain question."""
        return not self._differs(LEVELS)

    def _differs(self, fields: Mapping[str, Any]) -> bool:
        return any(getattr(self, name) != value for name, value in fields.items())

    def own_code(self) -> dict[str, str]:
        """Fields that name an own function, with the digest of the file that it was made of."""
        return {
            f"objective.{name}": source_digest(inspect.unwrap(self.own[path])) for name, path in self.own_functions()
        }

    def own_functions(self) -> list[tuple[str, str]]:
        """(field, import path) of each function that stands in no table."""
        named: list[tuple[str, str, Iterable[str]]] = [
            ("density", self.density, DENSITIES),
            ("weighting", self.weighting, WEIGHTINGS),
            ("loss", self.loss_name, LOSSES),
        ]
        return [(name, path) for name, path, table in named if path not in table and "." in path]

    def levels(self, u: Tensor) -> Tensor:
        """Noise levels from 0 (clean) to 1 (noise) for quantiles, before shift and range; (B,)."""
        density = DENSITIES.get(self.density) or self.own[self.density]
        return density(u, self.density_parameters)

    def _delta(self, timesteps: Tensor, dimensions: int) -> float | Tensor:
        if self.huber_schedule == "constant":
            return self.huber_delta
        share = timesteps.float() / self.schedule.num_timesteps
        delta = DELTA_SCHEDULES[self.huber_schedule](*self.schedule.alpha_sigma(timesteps), share, self.huber_delta)
        return delta.view((-1,) + (1,) * (dimensions - 1))

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
    density_alpha: float = 0.6,
    density_beta: float = 0.6,
    density_shift: float = 1.0,
    noise_range: tuple[float, float] = (0.0, 1.0),
    weighting: str = "none",
    snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
    loss: str = "mse",
    huber_delta: float = 0.1,
    huber_schedule: str = "constant",
    noise: NoiseShape = WHITE,
) -> Objective:
    """Join the base model's noise schedule with what the run asks for.

    Args:
        scheduler_config: the base's own `scheduler_config.json`. Without `prediction_type` it means epsilon,
            as in diffusers.
        prediction: None takes the base's own.
        noise: what the training's noise looks like; only judged here, it is drawn with the batch.

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
        density_parameters=DensityParameters(density_mean, density_std, density_scale, density_alpha, density_beta),
        density_shift=density_shift,
        noise_range=noise_range,
        weighting=weighting,
        weight_parameters=WeightParameters(snr_gamma, p2_gamma, p2_k),
        loss_name=loss,
        huber_delta=huber_delta,
        huber_schedule=huber_schedule,
    )
    problems = [problem for check in CHECKS for problem in check(objective, trained)]
    problems += _noise_contradictions(objective, noise)
    if not problems:
        objective, problems = _with_own_functions(objective)
    if problems:
        raise ConfigError("The objective cannot be trained:", problems)
    return objective


def _with_own_functions(objective: Objective) -> tuple[Objective, list[str]]:
    """The objective with the user's own functions, and what is wrong with them."""
    found, problems = {}, []
    for name, path in objective.own_functions():
        try:
            found[path] = own.function(path)
        except own.OwnFunctionError as error:
            problems.append(f"objective.{name}={path}: {error}.")
    objective = replace(objective, own=found)
    return objective, [*problems, *_failing_functions(objective)]


def _unknown_names(objective: Objective, trained: str) -> Iterable[str]:
    named: list[tuple[str, str, Iterable[str]]] = [
        ("prediction", objective.prediction, PREDICTIONS),
        ("density", objective.density, DENSITIES),
        ("weighting", objective.weighting, WEIGHTINGS),
        ("loss", objective.loss_name, LOSSES),
        ("huber_schedule", objective.huber_schedule, DELTA_SCHEDULES),
    ]
    own_named = dict(objective.own_functions())
    for option, name, table in named:
        if name not in table and option not in own_named:
            yield f"objective.{option} is {name!r}{nearest(name, table)}; choose one of {', '.join(table)}."


def _numbers_out_of_range(objective: Objective, trained: str) -> Iterable[str]:
    # "not x > 0" also catches NaN.
    shape, weights = objective.density_parameters, objective.weight_parameters
    if objective.weighting in ("min_snr", "soft_min_snr") and not weights.snr_gamma > 0:
        yield f"objective.snr_gamma is {weights.snr_gamma}, so no picture would count; the paper uses 5."
    if objective.weighting == "p2" and not (weights.p2_gamma >= 0 and weights.p2_k > 0):
        yield (
            f"objective.p2_gamma is {weights.p2_gamma} and p2_k is {weights.p2_k}; the first must not be negative, the "
            "second must be positive; the paper uses 1 and 1."
        )
    if objective.loss_name in WITH_DELTA and not objective.huber_delta > 0:
        yield f"objective.huber_delta is {objective.huber_delta}, but it is a distance; 0.1 is usual."
    if objective.density == "beta" and not (shape.alpha >= 0.5 and shape.beta >= 0.5):
        yield f"objective.density_alpha, density_beta are {shape.alpha}, {shape.beta}; use 0.5 or more, 0.6 is usual."
    if not objective.density_shift > 0:
        yield f"objective.density_shift is {objective.density_shift}, but it is a factor; 1 changes nothing."
    first, last = objective.noise_range
    if not 0 <= first < last <= 1:
        yield f"objective.noise_range is {first} to {last}; give two shares of the schedule, e.g. 0.2 and 0.8."
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
            "use one of " + ", ".join(name for name, other in WEIGHTINGS.items() if kind in other.schedules) + "."
        )
    if objective.density == "cosmap" and objective.weighting == "cosmap":
        yield (
            "objective.density and objective.weighting are both 'cosmap', so the same curve would count "
            "twice; set objective.weighting=none."
        )
    if objective.huber_schedule != "constant" and objective.loss_name not in WITH_DELTA:
        yield (
            f"objective.huber_schedule is {objective.huber_schedule!r}, but objective.loss={objective.loss_name} has "
            f"no delta to schedule; set objective.loss to one of {', '.join(WITH_DELTA)}."
        )


def _failing_functions(objective: Objective) -> Iterable[str]:
    """Try the user's own functions over the whole schedule."""
    trials: dict[str, Callable[[], Iterable[str]]] = {
        "density": lambda: own.wrong_levels(objective.levels(own.quantiles())),
        "weighting": lambda: own.wrong_weights(objective.weight(objective.schedule.timesteps(own.quantiles()))),
        "loss": lambda: own.wrong_errors(objective.own[objective.loss_name], objective.huber_delta),
    }
    for name, path in objective.own_functions():
        try:
            wrong = list(trials[name]()) if path in objective.own else []
        except ConfigError as error:
            wrong = [error.headline]
        # keep: what an own function returns can be anything, and fail in what is done with it.
        except Exception as error:
            wrong = [f"it fails: {type(error).__name__}: {error}"]
        yield from (f"objective.{name}={path}: {what}." for what in wrong)


def _noise_contradictions(objective: Objective, noise: NoiseShape) -> Iterable[str]:
    if noise.offset and noise.pyramid:
        yield (
            "objective.noise_offset and objective.pyramid_noise are both on, and both add low frequencies to the "
            "noise; keep one."
        )
    named = [("noise_offset", noise.offset), ("pyramid_noise", noise.pyramid)]
    for name, value in named:
        if value and objective.schedule.zero_terminal_snr:
            yield (
                f"objective.{name} is {value:g}, but the base's schedule ends in pure noise, so it learns brightness "
                "without; noise of another kind would be one that sampling never starts from; set it to 0."
            )


CHECKS: tuple[Callable[[Objective, str], Iterable[str]], ...] = (
    _unknown_names,
    _numbers_out_of_range,
    _contradictions,
)
"""Each gets the objective and the base's own prediction, and yields what cannot be."""
