"""Full fine-tuning: the weights themselves are trained, with the base's kept beside them to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.errors import counted
from finetune.adapters.parts import Target


class Whole:
    """The weights and biases of layers of one network; see `parts.Part`.

    The base's own stay in main memory, in the base's number format, for `disabled`.
    """

    def __init__(self, target: Target) -> None:
        """Make the layers' parameters trainable, in fp32; their values stay."""
        self.train_share = target.train_share
        self.parameters: dict[str, nn.Parameter] = {}
        self.constants: dict[str, Tensor] = {}
        self._target = target
        self._base: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}
        seen: set[int] = set()
        for name, plan in target.layers.items():
            for suffix, parameter in target.module.get_submodule(name).named_parameters(recurse=False):
                if id(parameter) in seen:  # T5's two embeddings are one
                    continue
                seen.add(id(parameter))
                full = f"{target.disk_prefix}.{target.disk_name(name)}.{suffix}"
                self._base[full] = parameter.detach().cpu().clone()
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                self.parameters[full] = parameter
                self._rates[full] = plan.learning_rate

    def learning_rates(self) -> dict[str, float]:
        """See `parts.Part`."""
        return self._rates

    @contextlib.contextmanager
    @torch.no_grad()
    def disabled(self) -> Iterator[None]:
        """See `parts.Part`; the trained weights wait in main memory meanwhile."""
        kept = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        self._put(self._base)
        try:
            yield
        finally:
            self._put(kept)

    def after_step(self) -> None:
        """Nothing."""

    def header(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `parts.Part`."""
        return {name: tensors[name] for name in self.parameters}, {"method": {self._target.disk_prefix: "full"}}

    def unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing is packed."""
        return {}

    def describe(self) -> Iterator[tuple[str, str]]:
        """See `parts.Part`."""
        size = sum(parameter.numel() for parameter in self.parameters.values())
        layers = counted(len(self._target.layers), "layer")
        yield f"Trained whole, {self._target.disk_prefix}", f"{layers}, {size:,} weights"

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
