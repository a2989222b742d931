"""What is trained: PEFT adapters put into the denoiser's and the text encoders' layers, under canonical names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.adapters.files import AdapterFile, AdapterHeader
from finetune.adapters.methods import METHODS, Shape
from finetune.errors import CheckpointError, ConfigError
from finetune.rng import rng

_SLOT = "default"
"""PEFT's name for the one adapter a layer carries; it never reaches a file."""


@dataclass(frozen=True)
class Target:
    """One network that gets an adapter.

    Attributes:
        disk_prefix: first part of its parameters' names on disk, e.g. "unet" or "text_encoder".
        module: the network; its layers are replaced in place.
        method: a name in METHODS.
        shape: size and place of the adapter.
        learning_rate: step size after warm-up for these parameters.
        disk_name: from a layer's name as installed to its canonical name on disk.
    """

    disk_prefix: str
    module: nn.Module
    method: str
    shape: Shape
    learning_rate: float
    disk_name: Callable[[str], str]


class AdapterSet:
    """The adapters of one run: their parameters by canonical name, and how to save, load and switch them off."""

    def __init__(self, targets: list[Target], parameters: dict[str, dict[str, nn.Parameter]]) -> None:
        self._targets = targets
        self._parameters = parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its canonical name, e.g. "unet.mid_block....to_q.lora_A.weight"."""
        return {name: value for group in self._parameters.values() for name, value in group.items()}

    def parameter_groups(self) -> list[dict[str, object]]:
        """One optimizer group per network, with its own learning rate."""
        return [
            {"params": list(self._parameters[t.disk_prefix].values()), "lr": t.learning_rate, "name": t.disk_prefix}
            for t in self._targets
        ]

    def state(self) -> dict[str, Tensor]:
        """A copy of every trained tensor in fp32 on the CPU."""
        return {name: value.detach().float().cpu().clone() for name, value in self.named_parameters().items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved tensors in place.

        Raises:
            CheckpointError: if names or shapes are not exactly those of this run.
        """
        own = self.named_parameters()
        problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
        problems += [f"{name} does not belong to this run" for name in tensors.keys() - own.keys()]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, this run needs {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape
        ]
        if problems:
            raise CheckpointError("The saved adapter does not fit this run:", sorted(problems))
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model as it was, for as long as the context lasts."""
        layers = [m for t in self._targets for m in t.module.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def to_file(
        self,
        tensors: dict[str, Tensor],
        *,
        family: str,
        base: str,
        base_digest: str,
        trigger_words: tuple[str, ...],
        run_digest: str,
        step: int,
    ) -> AdapterFile:
        """The adapter as a file on disk would hold it; `tensors` are `state()` or their running mean."""
        header = AdapterHeader(
            family=family,
            base=base,
            base_digest=base_digest,
            method=self._targets[0].method,
            rank={t.disk_prefix: t.shape.rank for t in self._targets},
            alpha={t.disk_prefix: t.shape.alpha for t in self._targets},
            trigger_words=trigger_words,
            run_digest=run_digest,
            step=step,
        )
        return AdapterFile(tensors=tensors, header=header)


def attach(targets: list[Target], seed: int) -> AdapterSet:
    """Put fresh adapters into every target network; the networks' outputs do not change by it.

    Args:
        targets: what to adapt; must not be empty.
        seed: the run's seed; each tensor's start depends on it and on the tensor's name only.

    Raises:
        ConfigError: if a pattern matches no layer.
    """
    problems = [problem for target in targets for problem in _unmatched(target)]
    if problems:
        raise ConfigError("The adapter has nothing to attach to:", problems)
    parameters = {}
    for target in targets:
        inject_adapter_in_model(METHODS[target.method](target.shape), target.module, adapter_name=_SLOT)
        parameters[target.disk_prefix] = _trained_parameters(target)
        _start(parameters[target.disk_prefix], seed)
    return AdapterSet(targets, parameters)


def _trained_parameters(target: Target) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, in fp32 whatever the base is stored in."""
    found = {}
    for name, parameter in target.module.named_parameters():
        if f".{_SLOT}." in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[f"{target.disk_prefix}.{target.disk_name(name.replace(f'.{_SLOT}.', '.'))}"] = parameter
        else:
            parameter.requires_grad_(False)
    return found


@torch.no_grad()
def _start(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """A uniform in +-1/sqrt(fan in) (Kaiming with a = sqrt 5, PEFT's own choice), B zero."""
    for name, parameter in parameters.items():
        if name.endswith("lora_A.weight"):
            bound = parameter[0].numel() ** -0.5
            drawn = torch.rand(parameter.shape, generator=rng(seed, "adapter start", name))
            parameter.copy_((drawn * 2 - 1) * bound)
        elif name.endswith("lora_B.weight"):
            parameter.zero_()


def _unmatched(target: Target) -> list[str]:
    section = "text_encoder_adapter" if target.disk_prefix.startswith("text_encoder") else "adapter"
    field = f"{section}.targets={target.shape.pattern!r}"
    try:
        pattern = re.compile(target.shape.pattern)
    except re.error as error:
        return [f"{field} is no regular expression: {error}"]
    modules = dict(target.module.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
    matched = [name for name in modules if pattern.fullmatch(name)]
    foreign = [name for name in matched if name not in set(layers)]
    if foreign:
        return [
            f"{field} also matches {foreign[0]}, which is a {type(modules[foreign[0]]).__name__} and no single layer; "
            r"end the pattern with the layers that are meant, e.g. \.(to_q|to_k|to_v)"
        ]
    if matched:
        return []
    examples = ", ".join(layers[:: max(1, len(layers) // 4)][:4])
    return [
        f"{field} matches none of the {len(layers)} layers of {target.disk_prefix}; "
        f"the pattern must match a whole name such as {examples}"
    ]


__all__ = ["METHODS", "AdapterFile", "AdapterHeader", "AdapterSet", "Shape", "Target", "attach"]
