"""One algebra for every prediction: noise, targets, weights and losses against diffusers and the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor

from finetune.errors import ConfigError
from finetune.objectives import (
    DELTA_SCHEDULES,
    DENSITIES,
    LOSSES,
    PREDICTIONS,
    WEIGHTINGS,
    NoiseShape,
    build_objective,
)
from finetune.objectives.losses import mean_per_picture

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


Batch = tuple[Tensor, Tensor, Tensor]
"""(x0, noise, u)"""


def config_for(prediction: str) -> dict[str, Any]:
    return FLOW if prediction == "flow" else {**SD15, "prediction_type": prediction}


@pytest.fixture
def batch() -> Batch:
    """A batch of 8."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(8, 4, 6, 5, generator=generator)
    noise = torch.randn(8, 4, 6, 5, generator=generator)
    return x0, noise, torch.linspace(0.02, 0.98, 8)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noise_and_velocity_equal_diffusers(batch: Batch, zero_terminal_snr: bool) -> None:
    """The model saw this noise when it was trained."""
    x0, noise, u = batch
    config = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_terminal_snr}
    objective = build_objective(config)
    scheduler: Any = DDPMScheduler(**config)
    timesteps = objective.timesteps(u)
    torch.testing.assert_close(
        objective.add_noise(x0, noise, timesteps), scheduler.add_noise(x0, noise, timesteps), rtol=0, atol=0
    )
    torch.testing.assert_close(
        objective.target(x0, noise, timesteps), scheduler.get_velocity(x0, noise, timesteps), rtol=0, atol=0
    )


def test_flow_noise_equals_diffusers(batch: Batch) -> None:
    """Flow's x_t = (1 - s) x_0 + s noise, at the scheduler's own shifted levels."""
    x0, noise, _ = batch
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps[torch.tensor([0, 100, 300, 500, 700, 900, 990, 999])]
    objective = build_objective(FLOW)
    x_t = scheduler.scale_noise(x0, timesteps, noise)
    torch.testing.assert_close(objective.add_noise(x0, noise, timesteps), x_t, rtol=0, atol=1e-6)
    assert torch.equal(objective.target(x0, noise, timesteps), noise - x0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_perfect_prediction_returns_the_picture(name: str, batch: Batch) -> None:
    """Target and to_x0 are inverses, and a perfect prediction costs nothing under every loss."""
    x0, noise, u = batch
    objective = build_objective(config_for(name))
    timesteps = objective.timesteps(u)
    x_t = objective.add_noise(x0, noise, timesteps)
    target = objective.target(x0, noise, timesteps)
    torch.testing.assert_close(objective.to_x0(target, x_t, timesteps), x0, rtol=0, atol=1e-5)
    for loss in LOSSES:
        assert replace(objective, loss_name=loss).loss(target, x0, noise, timesteps).tolist() == [0.0] * 8


@pytest.mark.parametrize("name", PREDICTIONS)
def test_x0_gain_is_the_ratio_of_squared_errors(name: str, batch: Batch) -> None:
    """This ratio carries every SNR weighting from x_0 to the prediction; it is checked on a wrong prediction.
    """
    x0, noise, u = batch
    objective = build_objective(config_for(name))
    timesteps = objective.timesteps(u)
    wrong = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    own = ((wrong - objective.target(x0, noise, timesteps)) ** 2).flatten(1).mean(1)
    x_t = objective.add_noise(x0, noise, timesteps)
    in_x0 = ((objective.to_x0(wrong, x_t, timesteps) - x0) ** 2).flatten(1).mean(1)
    gain = PREDICTIONS[name].x0_gain(*objective.schedule.alpha_sigma(timesteps))
    torch.testing.assert_close(in_x0, own * gain, rtol=1e-4, atol=1e-9)


def test_min_snr_loss_is_the_same_for_every_prediction(batch: Batch) -> None:
    """min-SNR weighs the error in x_0, so the same answer said as noise, v or picture must cost the same."""
    x0, noise, u = batch
    said_x0 = x0 + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    losses = {}
    for name in ("epsilon", "v_prediction", "sample"):
        objective = build_objective(config_for(name), weighting="min_snr", snr_gamma=5.0)
        timesteps = objective.timesteps(u)
        alpha, sigma = (f.view(-1, 1, 1, 1) for f in objective.schedule.alpha_sigma(timesteps))
        said_noise = (objective.add_noise(x0, noise, timesteps) - alpha * said_x0) / sigma
        said = PREDICTIONS[name].target(said_x0, said_noise, alpha, sigma)
        losses[name] = objective.loss(said, x0, noise, timesteps)
    torch.testing.assert_close(losses["epsilon"], losses["sample"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(losses["v_prediction"], losses["sample"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0, float("inf")])
def test_min_snr_equals_the_published_formulas(gamma: float) -> None:
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v and 1 for x_0, as in diffusers' training scripts.
    """
    timesteps = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**SD15), timesteps)
    capped = snr.clamp(max=gamma)
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}
    for name, weight in expected.items():
        objective = build_objective(config_for(name), weighting="min_snr", snr_gamma=gamma)
        torch.testing.assert_close(objective.weight(timesteps), weight, rtol=2e-5, atol=0)


def test_min_snr_of_flow() -> None:
    """min((1 - s)^2, gamma s^2), finite at both ends."""
    s = torch.linspace(0, 1, 101)
    objective = build_objective({**FLOW, "shift": 1.0}, weighting="min_snr", snr_gamma=5.0)
    torch.testing.assert_close(
        objective.weight(1000 * s), torch.minimum((1 - s) ** 2, 5 * s**2), rtol=1e-5, atol=1e-7
    )


def test_min_snr_at_zero_terminal_snr_is_finite() -> None:
    """Pure noise has SNR 0 and must get weight 0, not 0 / 0."""
    config = {**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    weight = build_objective(config, weighting="min_snr").weight(torch.arange(1000))
    assert torch.isfinite(weight).all() and weight[-1] == 0


@pytest.mark.parametrize("name", ["none", "sigma_sqrt", "cosmap"])
def test_flow_weightings_equal_diffusers(name: str) -> None:
    """The Stable Diffusion 3 weightings, over sigma."""
    sigmas = torch.linspace(0.001, 1, 500)
    objective = build_objective(FLOW, weighting=name)
    torch.testing.assert_close(
        objective.weight(1000 * sigmas), compute_loss_weighting_for_sd3(name, sigmas), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_published_formula(name: str) -> None:
    """Small and large errors of the pseudo-Huber losses; square and absolute value exactly."""
    d, delta = torch.logspace(-6, 3, 200, dtype=torch.float64), 0.1
    root = (d**2 + delta**2).sqrt()
    smooth = 2 * (root - delta)
    x = d / delta
    log_cosh = torch.where(x < 0.01, x**2 / 2 - x**4 / 12, x.clamp(max=300).cosh().log() + (x - 300).clamp(min=0))
    expected = {
        "mse": d**2, "l1": d, "huber": delta * smooth, "smooth_l1": smooth, "log_cosh": 2 * delta**2 * log_cosh
    }[name]  # fmt: skip
    zero = torch.zeros_like(d)
    torch.testing.assert_close(LOSSES[name](d, zero, delta), expected, rtol=1e-5, atol=1e-15)
    assert torch.equal(LOSSES[name](-d, zero, delta), LOSSES[name](d, zero, delta))


@pytest.mark.parametrize("name", ["huber", "smooth_l1", "log_cosh"])
def test_delta_may_follow_the_noise_level(name: str) -> None:
    """With one delta per picture, each picture is judged as if it were alone."""
    d = torch.linspace(-2, 2, 12).view(3, 1, 2, 2)
    deltas = torch.tensor([0.1, 0.5, 1.0])
    together = LOSSES[name](d, torch.zeros_like(d), deltas.view(3, 1, 1, 1))
    for i, delta in enumerate(deltas.tolist()):
        torch.testing.assert_close(together[i], LOSSES[name](d[i], torch.zeros_like(d[i]), delta))


def test_delta_schedules_are_the_papers() -> None:
    """As in sd-scripts' `get_huber_threshold_if_needed`: 1 at a clean picture, delta at noise."""
    timesteps, delta = torch.arange(1000), 0.1
    alphas_cumprod = DDPMScheduler(**SD15).alphas_cumprod
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    expected = {
        "constant": torch.full((1000,), delta),
        "snr": (1 - delta) / (1 + sigmas) ** 2 + delta,
        "exponential": torch.exp(math.log(delta) / 1000 * timesteps),
    }
    alpha, sigma = build_objective(SD15).schedule.alpha_sigma(timesteps)
    assert expected.keys() == DELTA_SCHEDULES.keys()
    for name, schedule in DELTA_SCHEDULES.items():
        torch.testing.assert_close(schedule(alpha, sigma, timesteps / 1000, delta), expected[name], rtol=1e-5, atol=0)


def test_a_scheduled_huber_loss_forgives_more_in_noise(batch: Batch) -> None:
    """The schedule reaches the loss: the same error costs less where delta is small."""
    x0, noise, _ = batch
    objective = build_objective(SD15, loss="huber", huber_schedule="exponential")
    timesteps = torch.tensor([10] * 4 + [990] * 4)
    errors = objective.loss(noise + 1, x0, noise, timesteps)
    assert errors[:4].min() > 4 * errors[4:].max()


def weights_on_noise(name: str, **parameters: float) -> tuple[Tensor, Tensor]:
    """A weighting's weight of the error in the noise over all timesteps of SD1.5, and the signal-to-noise ratio."""
    timesteps = torch.arange(1000)
    objective = build_objective(config_for("epsilon"), weighting=name, **parameters)
    return objective.weight(timesteps), compute_snr(DDPMScheduler(**SD15), timesteps)


def test_debiased_and_p2_equal_the_published_formulas() -> None:
    """Both papers weigh the error in the noise: 1 / sqrt(SNR), and 1 / (k + SNR)^gamma."""
    weight, snr = weights_on_noise("debiased")
    torch.testing.assert_close(weight, snr**-0.5, rtol=2e-5, atol=0)
    for gamma, k in ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.0, 1.0)):
        weight, snr = weights_on_noise("p2", p2_gamma=gamma, p2_k=k)
        torch.testing.assert_close(weight, (k + snr) ** -gamma, rtol=2e-5, atol=0)


def test_soft_min_snr_is_hourglass_diffusions_at_gamma_1() -> None:
    """1 / (sigma^2 + 1) over x_0 with sigma = noise over signal, and always below min-SNR of the same cap."""
    weight, snr = weights_on_noise("soft_min_snr", snr_gamma=1.0)
    torch.testing.assert_close(weight * snr, 1 / (1 / snr + 1), rtol=2e-5, atol=0)
    soft, _ = weights_on_noise("soft_min_snr", snr_gamma=5.0)
    hard, _ = weights_on_noise("min_snr", snr_gamma=5.0)
    assert (soft < hard).all() and soft[(snr - 5).abs().argmin()] == pytest.approx(0.5, abs=0.01)


DEFINED = [(w, p) for w, p in product(WEIGHTINGS, PREDICTIONS) if PREDICTIONS[p].schedule in WEIGHTINGS[w].schedules]


@pytest.mark.parametrize(("name", "prediction"), DEFINED)
def test_weights_are_finite_from_clean_to_noise(name: str, prediction: str) -> None:
    """One infinite weight is one lost run."""
    config = config_for(prediction)
    if prediction in ("v_prediction", "sample"):
        config = {**config, "rescale_betas_zero_snr": True}
    objective = build_objective(config, weighting=name)
    timesteps = torch.linspace(0, 1000, 501) if prediction == "flow" else torch.arange(1000)
    weight = objective.weight(timesteps)
    assert torch.isfinite(weight).all() and (weight >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_zero_error(name: str) -> None:
    """Pixels that are already right must not poison the step."""
    prediction = torch.zeros(4, requires_grad=True)
    LOSSES[name](prediction, torch.zeros(4), 0.1).sum().backward()
    assert prediction.grad is not None and torch.isfinite(prediction.grad).all()


def test_mask_averages_over_the_area_it_keeps() -> None:
    """A small mask counts as much as a whole picture, and an empty one gives 0, not NaN."""
    errors = torch.arange(3 * 2 * 2 * 2, dtype=torch.float32).view(3, 2, 2, 2)
    mask = torch.zeros(3, 1, 2, 2)
    mask[0] = 1
    mask[1, 0, 0, 1] = 0.5
    got = mean_per_picture(errors, mask)
    expected = torch.stack([errors[0].mean(), errors[1, :, 0, 1].mean(), torch.tensor(0.0)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(mean_per_picture(errors), errors.flatten(1).mean(1))


def test_half_precision_predictions_are_judged_in_float32(batch: Batch) -> None:
    """Squares of half-precision errors would overflow or round away."""
    x0, noise, u = batch
    objective = build_objective(config_for("epsilon"))
    loss = objective.loss(noise.bfloat16() * 0, x0.bfloat16(), noise.bfloat16(), objective.timesteps(u))
    assert loss.dtype == torch.float32 and loss.shape == (8,)
    torch.testing.assert_close(loss, (noise.bfloat16().float() ** 2).flatten(1).mean(1))


ALLOWED = [
    (prediction, weighting, density)
    for prediction, weighting, density in product(PREDICTIONS, WEIGHTINGS, DENSITIES)
    if PREDICTIONS[prediction].schedule in WEIGHTINGS[weighting].schedules
    and not density == weighting == "cosmap"
]


PAIRS = [(prediction, weighting, "uniform", "mse") for prediction, weighting, density in ALLOWED if density == "mode"]
PAIRS += [("flow", "none", density, "mse") for density in DENSITIES]
PAIRS += [("epsilon", "none", density, "mse") for density in DENSITIES]
PAIRS += [(prediction, "none", "uniform", loss) for prediction in PREDICTIONS for loss in LOSSES]


@pytest.mark.parametrize(("prediction", "weighting", "density", "loss"), PAIRS)
@pytest.mark.parametrize("schedule", DELTA_SCHEDULES)
def test_step_reads_nothing_back_to_the_host(
    prediction: str, weighting: str, density: str, loss: str, schedule: str
) -> None:
    """A whole step must be recordable as one CUDA graph; on meta tensors every host read raises."""
    config = config_for(prediction)
    objective = build_objective(
        config, weighting=weighting, density=density, loss=loss, density_shift=2.0, noise_range=(0.1, 0.9)
    ).to("meta")
    objective = replace(objective, huber_schedule=schedule)
    x0, noise, mask = (torch.empty(2, c, 6, 5, device="meta") for c in (4, 4, 1))
    timesteps = objective.timesteps(torch.empty(2, device="meta"))
    x_t = objective.add_noise(x0, noise, timesteps)
    result = objective.loss(x_t, x0, noise, timesteps, mask)
    assert result.shape == (2,) and result.device.type == "meta"


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (SD15, {"prediction": "flow"}, "defined on a flow schedule"),
        (FLOW, {"prediction": "epsilon"}, "defined on a ddpm schedule"),
        (SD15, {"prediction": "v_prediction"}, "the base model predicts 'epsilon'"),
        ({**SD15, "rescale_betas_zero_snr": True}, {}, "needs v_prediction or sample"),
        (SD15, {"prediction": "epsilonn"}, "did you mean epsilon?"),
        (SD15, {"density": "logitnormal"}, "did you mean logit_normal?"),
        (SD15, {"weighting": "minsnr"}, "did you mean min_snr?"),
        (SD15, {"loss": "hubert"}, "did you mean huber?"),
        (SD15, {"weighting": "min_snr", "snr_gamma": 0.0}, "objective.snr_gamma is 0.0"),
        (SD15, {"weighting": "min_snr", "snr_gamma": float("nan")}, "objective.snr_gamma is nan"),
        (SD15, {"loss": "huber", "huber_delta": -1.0}, "objective.huber_delta is -1.0"),
        (SD15, {"density": "logit_normal", "density_std": 0.0}, "objective.density_std is 0.0"),
        (SD15, {"density": "mode", "density_scale": 2.0}, "objective.density_scale is 2.0"),
        (SD15, {"weighting": "sigma_sqrt"}, "defined on a flow schedule"),
        (FLOW, {"density": "cosmap", "weighting": "cosmap"}, "count twice"),
        (SD15, {"weighting": "p2", "p2_k": 0.0}, "p2_k is 0.0"),
        (SD15, {"density": "beta", "density_alpha": 0.2}, "use 0.5 or more"),
        (SD15, {"density_shift": 0.0}, "objective.density_shift is 0.0"),
        (SD15, {"noise_range": (0.8, 0.2)}, "objective.noise_range is 0.8 to 0.2"),
        (SD15, {"huber_schedule": "snr"}, "has no delta to schedule"),
        (SD15, {"loss": "huber", "huber_schedule": "snrr"}, "did you mean snr?"),
        (SD15, {"noise": NoiseShape(offset=0.1, pyramid=0.3)}, "both add low frequencies"),
        (FLOW, {"noise": NoiseShape(offset=0.1)}, "ends in pure noise"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    config: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    """Each of these would train without a message and give a useless adapter."""
    with pytest.raises(ConfigError) as caught:
        build_objective(config, **options)
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


def test_all_problems_come_at_once() -> None:
    """One run of the command shows everything that has to be mended."""
    with pytest.raises(ConfigError) as caught:
        build_objective(
            SD15, prediction="flow", density="x", weighting="cosmap", loss="huber", huber_delta=0.0
        )
    assert len(caught.value.problems) == 4


def test_old_configs_without_prediction_type_mean_epsilon() -> None:
    """Stable Diffusion 1.5 was published before the key existed."""
    assert build_objective(SD15).prediction == "epsilon"
    assert build_objective({**SD15, "prediction_type": "v_prediction"}).prediction == "v_prediction"
    assert build_objective(FLOW).prediction == "flow"


def test_density_shift_and_range_move_the_timesteps() -> None:
    """Squeezed, not cut off: the whole density on the part that is trained."""
    u = torch.linspace(0.0005, 0.9995, 1000)
    half = build_objective(SD15, noise_range=(0.5, 1.0)).timesteps(u)
    assert half.min() == 500 and half.max() == 999 and len(half.unique()) == 500
    noisy = build_objective(SD15, density_shift=3.0).timesteps(u)
    assert noisy[500] == int(1000 * 3 * u[500] / (1 + 2 * u[500]))
    both = build_objective({**FLOW, "shift": 3.0}, density_shift=3.0).timesteps(torch.tensor([0.5]))
    torch.testing.assert_close(both, torch.tensor([1000 * 3 * 0.75 / (1 + 2 * 0.75)]))


def test_loss_is_distance_to_the_target(batch: Batch) -> None:
    """The teacher's question goes through the same weighting, loss and mask."""
    x0, noise, u = batch
    objective = build_objective(config_for("v_prediction"), weighting="min_snr", loss="huber")
    timesteps = objective.timesteps(u)
    mask = torch.ones(8, 1, 6, 5)
    target = objective.target(x0, noise, timesteps)
    assert torch.equal(
        objective.loss(x0, x0, noise, timesteps, mask), objective.distance(x0, target, timesteps, mask)
    )
