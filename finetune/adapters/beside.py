"""Adapters beside frozen layers: PEFT's layers, put in by our plan, with starts of our own."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.import_utils import is_torchao_available
from peft.tuners.boft import layer as boft_layers
from torch import Tensor, nn

from data_tools.errors import counted
from finetune.adapters.layers import LayerPlan
from finetune.adapters.methods import METHODS, Where
from finetune.adapters.parts import Target
from finetune.adapters.starts import STARTS, SUBTRACTED, start, start_factors
from finetune.adapters.updates import UPDATES
from finetune.errors import ConfigError

SLOT = "default"
"""PEFT's name for the adapter that is trained; it never reaches a file."""
BEGIN = "begin"
"""The slot of a start that is subtracted: frozen, with -lora_B."""


class Beside:
    """Adapters of one method beside the layers of one network; see `parts.Part`."""

    def __init__(self, target: Target, seed: int) -> None:
        """Put fresh adapters in; the network's output does not change by it, but for rounding with `SUBTRACTED`."""
        self.train_share = target.train_share
        self.parameters: dict[str, nn.Parameter] = {}
        self.constants: dict[str, Tensor] = {}
        self._target = target
        self._plans: dict[str, LayerPlan] = {}
        if problems := peft_problems():
            raise ConfigError("Adapters cannot be put in:", problems)
        where = _where(target)
        slots = (SLOT, BEGIN) if target.shape.init in SUBTRACTED else (SLOT,)
        for slot in slots:
            config = METHODS[target.method].config(target.shape, where)
            assert config is not None, "whole weights are no layers beside others"
            with _quiet_and_uncompiled():
                inject_adapter_in_model(config, target.module, adapter_name=slot)
        for name, plan in target.layers.items():
            layer: Any = target.module.get_submodule(name)
            layer.set_adapter(list(slots))
            self._plans[self._canonical(name)] = plan
            self._start(name, layer, seed)

    def learning_rates(self) -> dict[str, float]:
        """See `parts.Part`; LoRA+ gives lora_B a multiple of lora_A's (Hayou et al. 2024, arXiv:2402.12354)."""
        ratio = self._target.shape.lora_plus_ratio
        rates = {}
        for name in self.parameters:
            layer, suffix = split(name, self._target.method)
            rates[name] = self._plans[layer].learning_rate * (ratio if suffix == "lora_B.weight" else 1.0)
        return rates

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """See `parts.Part`; to the bit, for the base's weights are never touched."""
        layers: list[Any] = [self._target.module.get_submodule(name) for name in self._target.layers]
        # keep: PEFT's enable_adapters also switches gradients, on again for what is meant to stay frozen.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def after_step(self) -> None:
        """Nothing."""

    def header(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `parts.Part`; a subtracted start makes each layer's factors twice as wide: B A - B0 A0."""
        prefix, shape = self._target.disk_prefix, self._target.shape
        double = 2 if self.constants else 1
        # keep: rslora divides by the root of the rank, so a doubled rank needs only root 2 times the alpha.
        stronger = double**0.5 if self._target.method == "rslora" else float(double)
        own = {name: tensors[name] for name in self.parameters}
        for name in self.constants:
            trained = name.removesuffix(f".{BEGIN}")
            dim = 0 if trained.endswith("lora_A.weight") else 1
            own[trained] = torch.cat([tensors[trained], self.constants[name].detach().float().cpu()], dim)
        plans = self._plans.items()
        return own, {
            "method": {prefix: self._target.method},
            "rank": {prefix: shape.rank * double},
            "alpha": {prefix: shape.alpha * stronger},
            "rank_pattern": {layer: p.rank * double for layer, p in plans if p.rank != shape.rank},
            "alpha_pattern": {layer: p.alpha * stronger for layer, p in plans if p.alpha != shape.alpha},
        }

    def unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `parts.Part`: the first half of doubled factors is trained, the second is the start."""
        found = {}
        for name in self.constants:
            trained = name.removesuffix(f".{BEGIN}")
            dim = 0 if trained.endswith("lora_A.weight") else 1
            saved, width = tensors.get(trained), self.parameters[trained].shape[dim]
            if saved is not None and saved.shape[dim] == 2 * width:
                found[trained], found[name] = saved.split(width, dim)
        return found

    def describe(self) -> Iterator[tuple[str, str]]:
        """See `parts.Part`."""
        target = self._target
        ranks = sorted({plan.rank for plan in self._plans.values()})
        size = sum(parameter.numel() for parameter in self.parameters.values())
        width = f" rank {' and '.join(map(str, ranks))}" if UPDATES[target.method].scaled else ""
        start_words = f", init {target.shape.init}" if target.shape.init != "default" else ""
        yield (
            f"Adapter, {target.disk_prefix}",
            f"{target.method}{width}{start_words}, {counted(len(self._plans), 'layer')}, {size:,} parameters",
        )

    def _canonical(self, name: str) -> str:
        return f"{self._target.disk_prefix}.{self._target.disk_name(name)}"

    @torch.no_grad()
    def _start(self, name: str, layer: Any, seed: int) -> None:
        """Take in a layer's tensors, fp32 whatever the base is stored in, and give them their start."""
        target, canonical = self._target, self._canonical(name)
        held: dict[str, dict[str, nn.Parameter]] = {SLOT: {}, BEGIN: {}}
        for path, parameter in layer.named_parameters():
            slot = next((slot for slot in held if f".{slot}." in f"{path}."), None)
            if slot is None or path.startswith("base_layer."):
                continue
            parameter.data = parameter.data.float()
            parameter.requires_grad_(slot == SLOT)
            held[slot][_suffix(path, slot)] = parameter
        weight = layer.get_base_layer().weight
        for suffix, parameter in held[SLOT].items():
            full = f"{canonical}.{suffix}"
            self.parameters[full] = parameter
            parameter.copy_(start(suffix, full, parameter, weight, seed))
        if target.shape.init != "default":
            down, up = held[SLOT]["lora_A.weight"], held[SLOT]["lora_B.weight"]
            first, second = start_factors(
                target.shape.init, canonical, down, up, weight, layer.scaling[SLOT], seed
            )
            down.copy_(first)
            up.copy_(second)
        if held[BEGIN]:
            held[BEGIN]["lora_A.weight"].copy_(held[SLOT]["lora_A.weight"])
            held[BEGIN]["lora_B.weight"].copy_(-held[SLOT]["lora_B.weight"])
            for suffix, parameter in held[BEGIN].items():
                self.constants[f"{canonical}.{suffix}.{BEGIN}"] = parameter


def peft_problems() -> list[str]:
    """What is installed that PEFT refuses to put any adapter beside, with what to do about it."""
    try:
        is_torchao_available()
    except ImportError as error:
        return [f"{error}. Nothing here needs torchao: `pip uninstall torchao`, or `pip install -U torchao`."]
    return []


@contextlib.contextmanager
def _quiet_and_uncompiled() -> Iterator[None]:
    """PEFT would compile a CUDA extension for BOFT, which one butterfly factor does not need, and warn of two slots."""
    kept = boft_layers.get_fbd_cuda
    boft_layers.get_fbd_cuda = lambda: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        boft_layers.get_fbd_cuda = kept


def split(name: str, method: str) -> tuple[str, str]:
    """(layer, suffix) of a canonical tensor name."""
    suffixes = {suffix for layout in UPDATES[method].layouts for suffix in layout}
    suffix = next(suffix for suffix in suffixes if name.endswith(f".{suffix}"))
    return name.removesuffix(f".{suffix}"), suffix


def _suffix(path: str, slot: str) -> str:
    """From a parameter's path inside a PEFT layer to its suffix on disk."""
    plain = f"{path}.".replace(f".{slot}.", ".").removesuffix(".")
    return plain if plain in STARTS else plain.removesuffix(".weight")


def _where(target: Target) -> Where:
    """PEFT's spelling of the plan: whole names, and one pattern per rank or alpha that is not the shape's."""
    ranks: dict[int, list[str]] = {}
    alphas: dict[float, list[str]] = {}
    for name, plan in target.layers.items():
        if plan.rank != target.shape.rank:
            ranks.setdefault(plan.rank, []).append(name)
        if plan.alpha != target.shape.alpha:
            alphas.setdefault(plan.alpha, []).append(name)
    return Where(
        "|".join(re.escape(name) for name in target.layers),
        {_whole(names): rank for rank, names in ranks.items()},
        {_whole(names): alpha for alpha, names in alphas.items()},
    )


def _whole(names: list[str]) -> str:
    # keep: PEFT lets any dotted prefix precede a pattern unless it is anchored.
    return "|".join(f"^{re.escape(name)}" for name in names)
