"""How much signal and noise a timestep means: t -> (alpha, sigma) of x_t = alpha * x_0 + sigma * noise.

Two kinds exist. "ddpm" is a table over integer timesteps 0 .. T-1 with alpha^2 + sigma^2 = 1. "flow" is the
straight line of rectified flow, alpha = 1 - sigma, over real timesteps in [0, T].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.errors import ConfigError, nearest

Kind = Literal["ddpm", "flow"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """One noise schedule. Make it with `from_config`, `ddpm` or `flow`.

    Attributes:
        kind: "ddpm" or "flow".
        num_timesteps: T, the number of noise levels the base model was trained with; 1000 in every published
            model.
        shift: flow only. Pushes quantiles towards noise; 1 leaves them alone.
        zero_terminal_snr: whether the last timestep is pure noise (alpha = 0).
        alpha: ddpm only. Table of shape (T,), float32.
        sigma: likewise.
    """

    kind: Kind
    num_timesteps: int
    shift: float = 1.0
    zero_terminal_snr: bool = False
    alpha: Tensor | None = None
    sigma: Tensor | None = None

    def timesteps(self, s: Tensor) -> Tensor:
        """Turn noise fractions into the timesteps the denoiser is told.

        Args:
            s: shape (B,), in [0, 1]; 0 is clean, 1 is noise.

        Returns:
            ddpm: floor(s * T), int64, at most T - 1. flow: T * shift * s / (1 + (shift - 1) * s), float32.

        Source of the flow shift: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
        """
        if self.kind == "flow":
            s = s.float()
            return self.num_timesteps * (self.shift * s / (1 + (self.shift - 1) * s))
        return (s * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise factors of timesteps of shape (B,); both of shape (B,) and float32.

        The tables are not moved here, because that would wait for the device: call `to` once, before the
        first step.
        """
        if self.alpha is None or self.sigma is None:
            sigma = timesteps.float() / self.num_timesteps
            return 1 - sigma, sigma
        return self.alpha[timesteps], self.sigma[timesteps]

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tables on `device`."""
        if self.alpha is None or self.sigma is None:
            return self
        return replace(self, alpha=self.alpha.to(device), sigma=self.sigma.to(device))


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2; infinite where sigma is 0."""
    return (alpha / sigma) ** 2


def linear_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    """Betas on a straight line. Source: Ho et al. 2020, arXiv:2006.11239, section 4."""
    return torch.linspace(start, end, num_timesteps, dtype=torch.float32)


def scaled_linear_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    """Betas whose square roots are on a straight line: Stable Diffusion 1, 2 and XL.

    Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py, `make_beta_schedule("linear")`.
    """
    return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float32) ** 2


def cosine_betas(start: float, end: float, num_timesteps: int) -> Tensor:
    """Betas from alpha_bar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), at most 0.999; no use of `start`, `end`.

    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17.
    """

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [(i / num_timesteps, (i + 1) / num_timesteps) for i in range(num_timesteps)]
    return torch.tensor([min(1 - alpha_bar(b) / alpha_bar(a), 0.999) for a, b in steps], dtype=torch.float32)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}
"""Beta schedules under diffusers' names: (beta_start, beta_end, T) -> betas of shape (T,)."""


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last timestep is pure noise and the first keeps its value.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    # Shift, then scale, in diffusers' order of operations: the tables then agree to the last bit.
    scale = root[0] / (root[0] - root[-1])
    alpha_bar = ((root - root[-1]) * scale) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def ddpm(betas: Tensor, *, zero_terminal_snr: bool = False) -> Schedule:
    """The variance-preserving schedule of betas of shape (T,): alpha_t^2 is the product of (1 - beta) up to
    t.
    """
    if zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return Schedule(
        kind="ddpm",
        num_timesteps=len(betas),
        # Read from the table, not from the switch: trained betas may end in pure noise by themselves.
        zero_terminal_snr=bool(alpha_bar[-1] == 0),
        alpha=alpha_bar.sqrt(),
        sigma=(1 - alpha_bar).sqrt(),
    )


def flow(shift: float = 1.0, num_timesteps: int = 1000) -> Schedule:
    """Rectified flow, alpha = 1 - sigma. Source: Liu et al. 2022, arXiv:2209.03003."""
    return Schedule(kind="flow", num_timesteps=num_timesteps, shift=shift, zero_terminal_snr=True)


def from_config(config: dict[str, Any]) -> Schedule:
    """Read the schedule from a pipeline's `scheduler_config.json`; a missing beta is refused, not guessed.

    A flow schedule with `use_dynamic_shifting` gets no shift here, as in diffusers: that shift depends on the
    picture's size.

    Raises:
        ConfigError: if the file describes a schedule that is not known, listing everything that is missing or
            wrong.
    """
    if is_flow(config):
        shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
        return flow(shift, int(config.get("num_train_timesteps", 1000)))
    zero_terminal_snr = bool(config.get("rescale_betas_zero_snr", False))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        return ddpm(betas, zero_terminal_snr=zero_terminal_snr)
    problems = _beta_problems(config)
    if problems:
        headline = "The base model's noise schedule, scheduler/scheduler_config.json, cannot be used:"
        raise ConfigError(headline, problems)
    make_betas = BETA_SCHEDULES[config["beta_schedule"]]
    start, end = float(config["beta_start"]), float(config["beta_end"])
    betas = make_betas(start, end, int(config["num_train_timesteps"]))
    return ddpm(betas, zero_terminal_snr=zero_terminal_snr)


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler config means rectified flow: by class, prediction type, or a shift without betas.

    The last is for the config of a live scheduler object, which does not carry its class.
    """
    by_class = "FlowMatch" in str(config.get("_class_name", ""))
    by_shift = "shift" in config and "beta_schedule" not in config
    return by_class or by_shift or config.get("prediction_type") == "flow_prediction"


def _beta_problems(config: dict[str, Any]) -> list[str]:
    required = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    problems = [
        f"{key} is missing, so the noise levels the base was trained with are unknown; "
        "copy scheduler/scheduler_config.json from the original model."
        for key in required
        if config.get(key) is None
    ]
    name = config.get("beta_schedule")
    if name is not None and name not in BETA_SCHEDULES:
        known = ", ".join(BETA_SCHEDULES)
        problems.append(
            f"beta_schedule is {name!r}{nearest(str(name), BETA_SCHEDULES)}, which is not one of {known}; "
            "give the noise levels as trained_betas instead."
        )
    return problems
