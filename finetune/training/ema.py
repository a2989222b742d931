"""A running mean of the trained parameters, kept on their device in their own number format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from finetune.errors import CheckpointError


class Ema:
    """Exponential moving average over named parameters.

    Args:
        named_parameters: the parameters to follow; the mean starts at their present values.
        decay: the share of the old mean that remains after a step, once warmed up; in [0, 1).
    """

    def __init__(self, named_parameters: Mapping[str, Parameter], decay: float) -> None:
        assert 0 <= decay < 1, f"decay is {decay}, but it must lie in [0, 1)"
        self.decay = decay
        self._parameters = dict(named_parameters)
        self._mean = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def decay_at(self, step: int) -> float:
        """The decay of one step; it grows from 0, so that the start does not linger in the mean.

        0 at the first step, min(decay, step / (step + 9)) from then on.

        Source: diffusers.training_utils.EMAModel without `use_ema_warmup`: (1 + n) / (10 + n) with n = step -
            1.
        """
        return 0.0 if step <= 1 else min(self.decay, step / (step + 9))

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

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the parameters hold the means; then they are back, to the bit, whatever happened.
        """
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy_in(self._mean)
        try:
            yield
        finally:
            self._copy_in(kept)

    @torch.no_grad()
    def _copy_in(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
