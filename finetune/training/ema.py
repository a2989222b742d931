"""What is exported instead of the parameters as the last step left them: a running mean of them.

`Ema` keeps one beside the optimizer; `ScheduleFreeMean` reads the one that a schedule-free optimizer keeps itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from finetune.errors import CheckpointError


class Mean(Protocol):
    """Values that stand in for the trained parameters when they are judged, rendered or exported."""

    def state(self) -> dict[str, Tensor]:
        """The values by parameter name; write or copy them before the next step."""
        ...

    def swapped(self) -> AbstractContextManager[None]:
        """Within the block the parameters hold these values; then they are back, to the bit, whatever happened."""
        ...


class Ema:
    """Exponential moving average over named parameters, kept on their device in their own number format.

    Args:
        named_parameters: the parameters to follow; the mean starts at their present values.
        decay: the share of the old mean that remains after a step, once warmed up; in [0, 1).
        power: how fast it warms up, in (0, 1]; None: as n / (n + 9).
    """

    def __init__(self, named_parameters: Mapping[str, Parameter], decay: float, power: float | None = None) -> None:
        assert 0 <= decay < 1, f"decay is {decay}, but it must lie in [0, 1)"
        self.decay = decay
        self._power = power
        self._parameters = dict(named_parameters)
        self._mean = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def decay_at(self, step: int) -> float:
        """The decay of one step; it grows from 0, so that the start does not linger in the mean.

        0 at the first step, min(decay, step / (step + 9)) from then on, or min(decay, 1 - step^-power).

        Source: diffusers.training_utils.EMAModel: (1 + n) / (10 + n) with n = step - 1, or with `use_ema_warmup` and
            inv_gamma 1 the power.
        """
        if step <= 1:
            return 0.0
        return min(self.decay, step / (step + 9) if self._power is None else 1 - step**-self._power)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """mean -= (1 - decay) (mean - parameter), after optimizer step `step`, counted from 1."""
        means, parameters = list(self._mean.values()), list(self._parameters.values())
        gaps = torch._foreach_sub(means, parameters)
        torch._foreach_sub_(means, gaps, alpha=1 - self.decay_at(step))

    def state(self) -> dict[str, Tensor]:
        """The live means by parameter name: write or copy them before the next update."""
        return dict(self._mean)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            CheckpointError: if names or shapes differ; nothing is then loaded.
        """
        problems = [f"{name} is missing." for name in sorted(self._mean.keys() - tensors.keys())]
        problems += [f"{name} is foreign." for name in sorted(tensors.keys() - self._mean.keys())]
        problems += [
            f"{name} has shape {list(tensors[name].shape)} instead of {list(mean.shape)}."
            for name, mean in self._mean.items()
            if name in tensors and tensors[name].shape != mean.shape
        ]
        if problems:
            remedy = "resume with the adapter it was written for, or choose another output_dir."
            raise CheckpointError("The running mean (EMA) cannot be loaded:", [*problems, remedy])
        for name, mean in self._mean.items():
            mean.copy_(tensors[name])

    def swapped(self) -> AbstractContextManager[None]:
        """See `Mean.swapped`."""
        return _swapped(self._parameters, self._mean)


class ScheduleFreeMean:
    """The averaged point x of a schedule-free optimizer, which trains at y = beta_1 x + (1 - beta_1) z.

    Source: Defazio et al. 2024, The road less scheduled, arXiv:2405.15682, equations 3 to 5.
    """

    def __init__(self, named_parameters: Mapping[str, Parameter], optimizer: Optimizer) -> None:
        self._parameters = dict(named_parameters)
        self._optimizer = optimizer

    def state(self) -> dict[str, Tensor]:
        """x = (y - (1 - beta_1) z) / beta_1 by parameter name; y itself before the first step."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        values = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                y = parameter.detach().clone()
                z = self._optimizer.state[parameter].get("z")
                values[names[parameter]] = y if z is None else y.lerp_(z, 1 - 1 / group["betas"][0])
        return values

    def swapped(self) -> AbstractContextManager[None]:
        """See `Mean.swapped`."""
        return _swapped(self._parameters, self.state())


@contextmanager
def _swapped(parameters: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _copy_in(parameters, values)
    try:
        yield
    finally:
        _copy_in(parameters, kept)


@torch.no_grad()
def _copy_in(parameters: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
