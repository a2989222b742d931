"""Signs that a base was distilled for few-step sampling, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEW_STEPS = (
    "the base looks distilled for few-step sampling ({sign}). Ordinary training pulls it back towards many steps and "
    "guidance: train on the undistilled base instead and use the adapter on this one, or sample with more steps "
    "afterwards"
)


def unet_notes(denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> list[str]:
    """Signs of LCM and Turbo in a UNet's and its scheduler's configuration."""
    signs = []
    if denoiser_config.get("time_cond_proj_dim"):
        signs.append("its UNet is told a guidance strength (time_cond_proj_dim)")
    if scheduler_config.get("_class_name") in {"LCMScheduler", "TCDScheduler"}:
        signs.append(f"its scheduler is {scheduler_config['_class_name']}")
    euler = scheduler_config.get("_class_name") in {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
    trailing = scheduler_config.get("timestep_spacing") == "trailing"
    if euler and trailing and not scheduler_config.get("rescale_betas_zero_snr"):
        signs.append("its scheduler is Euler with timestep_spacing=trailing and no zero terminal SNR, as SD Turbo's")
    return [FEW_STEPS.format(sign="; ".join(signs))] if signs else []
