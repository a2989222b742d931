"""What an adapter does to each live layer, in double precision: the truth that every written file is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.errors import counted
from finetune.adapters.files import DOWN, UP, delta_weight
from finetune.adapters.updates import LORA, UPDATES, merged_bias, merged_weight
from finetune.errors import first_few
from finetune.export.errors import ExportError
from finetune.export.job import Job
from finetune.interchange.adapter import Place
from finetune.sampling.apply import adapter_targets

Deltas = dict[Place, Callable[[], dict[str, Tensor]]]
"""(component, canonical layer) -> what is added to its parameters ("weight", "bias"), on the CPU. Computed when it is
asked for, so that no more than one layer is held at a time."""


@dataclass(frozen=True)
class Change:
    """What is done to one layer.

    Attributes:
        layer: the live one; never changed.
        tensors: of the adapter, by suffix.
    """

    layer: nn.Module
    method: str
    tensors: Mapping[str, Tensor]
    scale: float
    options: Mapping[str, Any]

    def deltas(self) -> dict[str, Tensor]:
        """Parameter -> what is added to it, on the CPU in double precision; parameters that stay are left out."""
        if UPDATES[self.method].layouts == (LORA,):
            low_rank = delta_weight(self.tensors[DOWN[1:]].double(), self.tensors[UP[1:]].double())
            return {"weight": low_rank.cpu() * self.scale}
        own = {name: parameter.detach().cpu().double() for name, parameter in self._parameters().items()}
        if not UPDATES[self.method].layouts:
            new = {name: tensor.cpu().double() for name, tensor in self.tensors.items()}
        else:
            new = {"weight": merged_weight(self.method, self.tensors, own["weight"], self.scale, self.options)}
            bias = merged_bias(self.method, self.tensors, own.get("bias"))
            new |= {} if bias is None or torch.equal(bias, own["bias"]) else {"bias": bias}
        return {name: tensor - own[name] for name, tensor in new.items()}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.layer.named_parameters(recurse=False))


def changes(job: Job) -> dict[Place, Change]:
    """Every layer that the adapter changes.

    Raises:
        CheckpointError: if the adapter contradicts itself or does not fit the base.
    """
    layers = adapter_targets(job.family, job.components, job.file)
    header = job.file.header
    return {
        place: Change(layers[place], header.method[place[0]], tensors, job.file.scale(*place), header.options)
        for place, tensors in job.file.layers().items()
    }


def deltas(job: Job) -> Deltas:
    """`changes` as functions."""
    return {place: change.deltas for place, change in changes(job).items()}


def check(job: Job) -> None:
    """Refuse an adapter that is not worth a file.

    Raises:
        CheckpointError: if it contradicts itself or does not fit the base.
        ExportError: if a tensor is not finite or a layer has learnt nothing; all are listed.
    """
    broken, idle = [], []
    found = changes(job)
    for name, tensor in sorted(job.file.tensors.items()):
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            broken.append(f"{name} has {counted(count, 'value that is', 'values that are')} not finite.")
        elif name.endswith((DOWN, UP)) and not bool(tensor.any()):
            idle.append(f"{name} is all zero: the layer has learnt nothing.")
    if not job.file.tensors:
        idle.append("it holds no tensors at all.")
    if found and not broken and not idle and all(_unchanged(change) for change in found.values()):
        idle.append("no layer differs from the base's: nothing was learnt.")
    if broken or idle:
        raise ExportError(
            "The adapter cannot be exported. Export an earlier checkpoint of the run"
            + (
                ", or train again with a lower learning rate."
                if broken
                else ", or train it at least one step."
            ),
            first_few([*broken, *idle]),
        )


def _unchanged(change: Change) -> bool:
    """Whether a layer is what it was; LoRA factors are looked at one by one already."""
    if UPDATES[change.method].layouts == (LORA,):
        return False
    return not any(bool(delta.any()) for delta in change.deltas().values())
