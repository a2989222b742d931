"""Fields of what the denoiser is asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class ObjectiveConfig(Section):
    """What the denoiser is asked: the prediction, the noise levels and how errors are weighed."""

    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
    """What the denoiser predicts. None: what the checkpoint's scheduler says, which is nearly always right."""
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """How often each noise level is trained."""
    density_mean: float = 0.0
    """Centre of logit_normal; positive favours noisy levels."""
    density_std: float = Field(default=1.0, gt=0)
    """Width of logit_normal."""
    density_scale: float = 1.29
    """Shape of mode; positive favours the middle. SD3's paper uses 1.29."""
    weighting: Literal["none", "min_snr", "sigma_sqrt", "cosmap"] = "none"
    """How noise levels are weighed against each other; sigma_sqrt and cosmap are for flow models."""
    snr_gamma: float = Field(default=5.0, gt=0)
    """The cap of min_snr; the paper uses 5."""
    loss: Literal["mse", "l1", "huber", "smooth_l1"] = "mse"
    """How an error is measured."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where huber and smooth_l1 turn from squared to linear, in units of the prediction."""
