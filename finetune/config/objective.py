"""Fields of the training objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.names import known_or_path
from finetune.config.section import Section

DensityName = Literal["uniform", "logit_normal", "mode", "cosmap", "beta"]
WeightingName = Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "sigma_sqrt", "cosmap"]
LossName = Literal["mse", "l1", "huber", "smooth_l1", "log_cosh"]
OWN = "a function of your own as module.function (docs/methods.md)"


class TeacherConfig(Section):
    """Prior preservation without class pictures: on class prompts the adapter must answer as the base does."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Class prompts without the trigger word, e.g. "a photo of a dog"; used in turn."""
    weight: float = Field(default=1.0, gt=0)
    """What it counts against the subject's loss, on average over all steps."""
    every: int = Field(default=2, ge=1)
    """Optimizer steps from one question to the next, each weighing so many times as much. A step that asks takes 2.3
    times as long: 1 costs 133 % more time, 2 costs 67 %, 4 costs 33 %."""


class ObjectiveConfig(Section):
    """The training objective: prediction, noise levels, loss and weighting."""

    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
    """What the denoiser predicts. None: as the checkpoint's scheduler says, which is nearly always right."""
    density: Annotated[DensityName | str, known_or_path(DensityName, "density", OWN)] = "uniform"
    """How often each noise level is trained; or a function of your own by import path."""
    density_mean: float = 0.0
    """Centre of logit_normal; positive favours noisy levels."""
    density_std: float = Field(default=1.0, gt=0)
    """Width of logit_normal."""
    density_scale: float = 1.29
    """Shape of mode; positive favours the middle. SD3's paper uses 1.29."""
    density_alpha: float = Field(default=0.6, ge=0.5)
    """First shape of beta: above density_beta it favours noise."""
    density_beta: float = Field(default=0.6, ge=0.5)
    """Second shape of beta; both below 1 favour the ends, both above 1 the middle."""
    density_shift: float = Field(default=1.0, gt=0)
    """Pushes any density towards noise (above 1) or clean pictures (below 1), besides the base's own shift."""
    noise_range: tuple[float, float] = (0.0, 1.0)
    """The part of the noise levels that is trained, as shares: 0 is clean, 1 noise. 0.2,0.8: timesteps 200 to 799. A
    flow base's own shift is applied afterwards: with SD3's shift of 3 they become 429 to 923."""
    weighting: Annotated[WeightingName | str, known_or_path(WeightingName, "weighting", OWN)] = "none"
    """How noise levels are weighted; sigma_sqrt and cosmap are for flow models. Or a function of your own by import
    path."""
    snr_gamma: float = Field(default=5.0, gt=0)
    """The cap of min_snr and soft_min_snr; the paper uses 5."""
    p2_gamma: float = Field(default=1.0, ge=0)
    """How strongly p2 holds clean pictures back; the paper uses 0.5 and 1."""
    p2_k: float = Field(default=1.0, gt=0)
    """The signal-to-noise ratio at which p2 sets in; the paper uses 1."""
    loss: Annotated[LossName | str, known_or_path(LossName, "loss", OWN)] = "mse"
    """How errors are measured; or a function of your own by import path."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where huber, smooth_l1 and log_cosh turn from squared to linear, in units of the prediction."""
    huber_schedule: Literal["constant", "snr", "exponential"] = "constant"
    """How that delta follows the noise level: the same everywhere, or from 1 for clean pictures to huber_delta for
    noise, by the signal-to-noise ratio or exponentially in the timestep."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """Strength of a constant per channel added to the noise, so that brightness can be learned; 0.05 is usual."""
    pyramid_noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of each coarser level in noise made of several resolutions; 0.3 is usual, 0 is off."""
    input_perturbation: float = Field(default=0.0, ge=0, le=1)
    """Strength of extra noise in the input but not in the target, which makes the model robust to small errors; 0.1 is
    usual."""
    teacher: TeacherConfig | None = None
    """Keep the class with the frozen base as teacher instead of class pictures (data.prior). None turns it off."""
