"""Optimizers by name, each with what it is, what it costs, and where it comes from.

An entry gets (groups, config, device) and gives a `BuiltOptimizer`. Arguments that the configuration leaves open are
the library's own; `optimizer.options` reaches every one of them. Any other class comes by its import path.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.by_path import import_by_path, source_digest
from finetune.config import OptimizerConfig
from finetune.errors import ConfigError, nearest
from finetune.training import eight_bit
from finetune.training.optimizer_state import parameters_of, state_format

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch's AdamW has one kernel for a whole step."""
INSTALLED = {"site-packages", "dist-packages"}
"""Where packages lie, whose version may change between two halves of a run."""
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer and what it turned out to be.

    Attributes:
        resolved: what really runs, e.g. "bitsandbytes AdamW8bit"; two runs whose state can be exchanged say
            the same.
        notes: sentences the user should see: what differs from the name asked for, and what it costs.
        keeps_mean: whether the parameters to judge and export are a mean that the optimizer keeps itself.
    """

    optimizer: Optimizer
    resolved: str
    notes: tuple[str, ...] = ()
    keeps_mean: bool = False


def build_optimizer(config: OptimizerConfig, groups: Groups, device: torch.device) -> BuiltOptimizer:
    """Build the optimizer that a run asks for.

    Args:
        groups: one dict per group with "params" (float32 parameters on `device`), "lr" and "name".
        device: where the parameters are; decides which kernels there are.

    Raises:
        ConfigError: if a package is missing, a class cannot be used, or an option is unknown.
    """
    ready = [{**g, "params": list(g["params"]), "initial_lr": float(g["lr"])} for g in groups]
    if config.name in OPTIMIZERS:
        return OPTIMIZERS[config.name](ready, config, device)
    return by_import_path(ready, config, device)


def rehearse(config: OptimizerConfig, device: torch.device) -> None:
    """Build the optimizer for one small matrix and take a step: what is wrong with it shows before anything is loaded.

    Raises:
        ConfigError: see `build_optimizer`; also for one whose step wants a closure, sparse gradients or other betas.
    """
    matrix = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    matrix.grad = torch.ones_like(matrix)
    built = build_optimizer(config, [{"params": [matrix], "lr": config.learning_rate, "name": "rehearsal"}], device)
    try:
        built.optimizer.step()
    except Exception as error:
        raise _unusable(f"{config.name} cannot take a step here: {error}.") from error


def adamw(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """torch's AdamW, fused into one kernel where the device has one: 8 bytes of state per parameter.

    On CUDA the learning rate is a device scalar and the step can be recorded in a CUDA graph.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    capturable = device.type == "cuda"
    if capturable:
        groups = [{**group, "lr": torch.tensor(group["initial_lr"], device=device)} for group in groups]
    own = {"fused": device.type in FUSED_DEVICES or None, "capturable": capturable}
    built = _built(torch.optim.AdamW, groups, config, own)
    # keep: torch advises to turn capturable off while nothing is captured; the user has no such switch.
    built.optimizer._warned_capturable_if_run_uncaptured = True
    return built


def adamw8bit(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """AdamW with 8-bit state in blocks of 256: about 2 bytes per parameter in tensors of 1024 elements or more.

    Source: Dettmers et al. 2021, arXiv:2110.02861. Devices without kernels get torch's AdamW and a note
        saying so.
    """
    if device.type not in eight_bit.DEVICES:
        return _without_kernels(groups, config, device)
    return _eight_bit("AdamW8bit", groups, config, device)


def paged_adamw8bit(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """adamw8bit whose state moves to main memory when the GPU is full; elsewhere than on CUDA nothing is
    paged.
    """
    if device.type != "cuda":
        built = adamw8bit(groups, config, device)
        note = f"paged_adamw8bit pages on CUDA only; on {device.type} it is adamw8bit."
        return BuiltOptimizer(built.optimizer, built.resolved, (note, *built.notes))
    built = _eight_bit("PagedAdamW8bit", groups, config, device)
    return BuiltOptimizer(built.optimizer, built.resolved, (*built.notes, *eight_bit.paging_notes(groups)))


def lion8bit(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """The sign of a running mean, kept in 8 bits: about 1 byte per parameter; wants a third of AdamW's rate or less.

    Source: Chen et al. 2023, arXiv:2302.06675; state as in `adamw8bit`.
    """
    return _eight_bit("Lion8bit", groups, config, device)


def ademamix8bit(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """AdamW with a second, slow mean of the gradient, in 8 bits: about 3 bytes per parameter. For long runs.

    Source: Pagliardini et al. 2024, arXiv:2409.03137; state as in `adamw8bit`.
    """
    return _eight_bit("AdEMAMix8bit", groups, config, device)


def adafactor(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """torch's Adafactor: the second moment as a row and a column, nearly no state, no momentum.

    Source: Shazeer and Stern 2018, arXiv:1804.04235. Its step is relative: learning rates of 1e-3 to 1e-2 are usual.
    """
    return _built(torch.optim.Adafactor, groups, config)


def prodigy(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """Finds the step size itself from the distance travelled; learning_rate multiplies it and should be 1.

    Source: Mishchenko and Defazio 2023, arXiv:2306.06101; package prodigyopt.
    """
    rates = sorted({group["initial_lr"] for group in groups})
    if len(rates) > 1:
        raise _unusable(
            f"prodigy finds one step size for all parameters, but this run has the learning rates "
            f"{', '.join(f'{rate:g}' for rate in rates)}; leave the adapters' own learning_rate out."
        )
    return _built(_class("prodigyopt", "Prodigy", "optimizers"), groups, config)


def schedulefree_adamw(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """AdamW without a learning-rate curve: a running mean of the weights takes its place, and is what is exported.

    Source: Defazio et al. 2024, The road less scheduled, arXiv:2405.15682; package schedulefree.
    """
    built = _built(_class("schedulefree", "AdamWScheduleFree", "optimizers"), groups, config)
    built.optimizer.train()
    return BuiltOptimizer(built.optimizer, built.resolved, built.notes, keeps_mean=True)


def came(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """Adafactor with momentum, guided by how much an update can be trusted: 4 bytes per parameter.

    Source: Luo et al. 2023, arXiv:2307.02047; package pytorch-optimizer.
    """
    return _built(_class("pytorch_optimizer", "CAME", "optimizers"), groups, config)


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig, torch.device], BuiltOptimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "paged_adamw8bit": paged_adamw8bit,
    "lion8bit": lion8bit,
    "ademamix8bit": ademamix8bit,
    "adafactor": adafactor,
    "prodigy": prodigy,
    "schedulefree_adamw": schedulefree_adamw,
    "came": came,
}


def by_import_path(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    """Any class that torch calls an optimizer, from any installed package, e.g. "torch.optim.RAdam"."""
    module, _, name = config.name.rpartition(".")
    return _built(_class(module, name, None), groups, config)


def own_code(name: str) -> dict[str, str]:
    """The digest of the file of an optimizer of the user's own; none for the table's and for installed packages'."""
    if name in OPTIMIZERS:
        return {}
    module, _, own = name.rpartition(".")
    found = _class(module, own, None)
    file = inspect.getsourcefile(found)
    return {} if file is None or INSTALLED & set(Path(file).parts) else {name: source_digest(found)}


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Give every group its own base rate times `factor`; on CUDA this fills the scalar that a recorded step
    reads.
    """
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _eight_bit(name: str, groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    if device.type not in eight_bit.DEVICES:
        raise _unusable(
            f"{config.name} needs 8-bit kernels, which bitsandbytes does not have for {device.type}; "
            "set optimizer.name=adamw."
        )
    cls = getattr(eight_bit.optimizers_for(device), name)
    built = _built(cls, groups, config, {"min_8bit_size": eight_bit.MIN_ELEMENTS})
    return BuiltOptimizer(built.optimizer, built.resolved, eight_bit.notes(config.name, groups, device))


def _without_kernels(groups: Groups, config: OptimizerConfig, device: torch.device) -> BuiltOptimizer:
    built = adamw(groups, config, device)
    extra = 6 * sum(parameter.numel() for parameter in parameters_of(groups))
    note = (
        f"bitsandbytes has no 8-bit kernels for {device.type}, so {config.name} runs as torch AdamW with 32-bit "
        f"state, which takes {extra / 2**20:,.1f} MiB more; set optimizer.name=adamw to say so yourself."
    )
    return BuiltOptimizer(built.optimizer, built.resolved, (note,))


def _built(
    cls: type[Optimizer], groups: Groups, config: OptimizerConfig, own: dict[str, Any] | None = None
) -> BuiltOptimizer:
    """Make a `cls` with what the configuration says, as far as the class has such an argument."""
    known = _arguments(cls)
    said = {"betas": config.betas, "weight_decay": config.weight_decay, "eps": config.eps}
    given = {name: value for name, value in said.items() if value is not None}
    unusable = [name for name in given if name not in known and name != "weight_decay"]
    if unusable:
        raise _unusable(f"optimizer.{unusable[0]} is given, but {cls.__name__} has no such setting; leave it out.")
    options = [name for name in known if name not in ("params", "lr")]
    foreign = [name for name in config.options if name not in options]
    if foreign:
        raise _unusable(
            "optimizer.options has 'lr'; say optimizer.learning_rate." if "lr" in foreign else
            f"optimizer.options has {foreign[0]!r}{nearest(foreign[0], options)}; {cls.__name__} knows "
            f"{', '.join(options)}."
        )  # fmt: skip
    arguments = {name: value for name, value in given.items() if name in known} | (own or {}) | config.options
    rate = next((group["initial_lr"] for group in groups), 1e-4)
    try:
        # keep: some greet on the standard output, which belongs to the command line.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = cls(groups, lr=rate, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unusable(f"{cls.__name__} refuses its settings: {error}.") from error
    notes = () if "weight_decay" in known or not config.weight_decay else (
        f"{cls.__name__} has no weight decay; optimizer.weight_decay={config.weight_decay:g} does nothing.",
    )  # fmt: skip
    return BuiltOptimizer(optimizer, state_format(optimizer), notes)


def _arguments(cls: type[Optimizer]) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]


def _class(module: str, name: str, extra: str | None) -> type[Optimizer]:
    """An optimizer class from a package that may not be installed; imported only here, because that takes seconds."""
    remedy = f"install it with `pip install 'finetune[{extra}]'`" if extra else "install its package"
    try:
        found = import_by_path(f"{module}.{name}")
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise _unusable(f"it needs the package {package}, which is missing ({error}); {remedy}.") from error
    # keep: a file of the user's own can fail in any way while it is imported.
    except Exception as error:
        if module not in sys.modules:
            raise _unusable(f"{module} cannot be imported: {error}.") from error
        known = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        raise _unusable(f"{module} has no {name}{nearest(name, known)}.") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise _unusable(f"{module}.{name} is no torch.optim.Optimizer; name the class of an optimizer.")
    return found


def _unusable(problem: str) -> ConfigError:
    return ConfigError("The optimizer cannot be built:", [problem])
