"""Optimizers by name; their state by parameter name, in tensors that safetensors can hold.

Learning rate and other settings are not part of the state: they follow from the run and the step.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from finetune.errors import CheckpointError, ConfigError, nearest

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch's AdamW has one kernel for a whole step."""
EIGHT_BIT_DEVICES = ("cpu", "cuda", "xpu")
"""Where bitsandbytes 0.50 has 8-bit kernels; ROCm calls itself cuda."""
MIN_8BIT_ELEMENTS = 1024
"""Smaller tensors keep 32-bit state. bitsandbytes' own 4096 would leave half of a small LoRA (rank 4 on SD1.5) in
32 bits; state is quantised in blocks of 256, so four blocks are enough to be worth it."""
MIN_PAGED_ELEMENTS = 100_000
"""bitsandbytes pages the state of larger tensors only."""


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer and what it turned out to be.

    Attributes:
        resolved: what really runs, e.g. "bitsandbytes AdamW8bit"; two runs whose state can be exchanged say
            the same.
        notes: sentences the user should see: what differs from the name asked for, and what it costs.
    """

    optimizer: Optimizer
    resolved: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What every AdamW needs besides the learning rate, which belongs to a parameter group."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    device: torch.device,
) -> BuiltOptimizer:
    """Build the optimizer called `name`.

    Args:
        groups: one dict per group with "params" (float32 parameters on `device`), "lr" and "name".
        device: where the parameters are; decides which kernels there are.

    Raises:
        ConfigError: if the name is unknown, or if bitsandbytes is needed and cannot be used.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ConfigError(
            "The optimizer cannot be built:",
            [f"optimizer.name is {name!r}{nearest(name, OPTIMIZERS)}; choose one of {known}."],
        )
    ready = [{**g, "params": list(g["params"]), "initial_lr": float(g["lr"])} for g in groups]
    return OPTIMIZERS[name](ready, Settings(betas, weight_decay, eps), device)


def adamw(groups: list[dict[str, Any]], settings: Settings, device: torch.device) -> BuiltOptimizer:
    """torch's AdamW, fused into one kernel where the device has one: 8 bytes of state per parameter.

    On CUDA the learning rate is a device scalar and the step can be recorded in a CUDA graph.
    """
    capturable = device.type == "cuda"
    if capturable:
        groups = [{**group, "lr": torch.tensor(group["initial_lr"], device=device)} for group in groups]
    optimizer = torch.optim.AdamW(
        groups,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        fused=device.type in FUSED_DEVICES or None,
        capturable=capturable,
    )
    return BuiltOptimizer(optimizer, state_format(optimizer))


def adamw8bit(groups: list[dict[str, Any]], settings: Settings, device: torch.device) -> BuiltOptimizer:
    """AdamW with 8-bit state in blocks of 256: about 2 bytes per parameter in tensors of 1024 elements or more.

    Source: Dettmers et al. 2021, arXiv:2110.02861. Devices without kernels get torch's AdamW and a note
        saying so.
    """
    if device.type not in EIGHT_BIT_DEVICES:
        return _without_kernels("adamw8bit", groups, settings, device)
    optimizer = _bitsandbytes(device).AdamW8bit(
        groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.eps,
        min_8bit_size=MIN_8BIT_ELEMENTS,
    )  # fmt: skip
    notes = _small_tensor_notes(groups)
    if device.type == "cpu":
        notes += ("adamw8bit on a CPU is slower than adamw; it saves memory only.",)
    return BuiltOptimizer(optimizer, state_format(optimizer), notes)


def paged_adamw8bit(groups: list[dict[str, Any]], settings: Settings, device: torch.device) -> BuiltOptimizer:
    """adamw8bit whose state moves to main memory when the GPU is full; elsewhere than on CUDA nothing is
    paged.
    """
    if device.type != "cuda":
        built = adamw8bit(groups, settings, device)
        note = f"paged_adamw8bit pages on CUDA only; on {device.type} it is adamw8bit."
        return BuiltOptimizer(built.optimizer, built.resolved, (note, *built.notes))
    optimizer = _bitsandbytes(device).PagedAdamW8bit(
        groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.eps,
        min_8bit_size=MIN_8BIT_ELEMENTS,
    )  # fmt: skip
    notes = _small_tensor_notes(groups)
    if all(p.numel() < MIN_PAGED_ELEMENTS for p in _parameters(groups)):
        notes += (f"paged_adamw8bit pages nothing here: no tensor has {MIN_PAGED_ELEMENTS:,} elements.",)
    return BuiltOptimizer(optimizer, state_format(optimizer), notes)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Settings, torch.device], BuiltOptimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "paged_adamw8bit": paged_adamw8bit,
}


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


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of state really held, by number format, e.g. {"uint8": 8192, "float32": 2304}; empty before the
    first step.
    """
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                total[str(value.dtype).removeprefix("torch.")] += value.nbytes
    return dict(total)


def state_format(optimizer: Optimizer) -> str:
    """What the state is made of. Equal formats can be exchanged: paging moves the state but does not change
    it.
    """
    library = type(optimizer).__module__.partition(".")[0]
    return f"{library} {type(optimizer).__name__.removeprefix('Paged')}"


def optimizer_state(
    optimizer: Optimizer, names: dict[Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state, by parameter name.

    Args:
        names: a name for each parameter of the optimizer.

    Returns:
        tensors: "<parameter>.<key>" -> the live tensor: write or copy it before the next step. What
            parameters share, such as an 8-bit code book, is there once as "shared.<key>".
        scalars: a JSON document: the format, and per parameter its numbers and the keys of its tensors.
    """
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for parameter in _parameters(optimizer.param_groups):
        name, state = names[parameter], optimizer.state.get(parameter, {})
        held = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
        parameters[name] = {
            "numbers": {key: value for key, value in state.items() if key not in held},
            "tensors": sorted(held),
        }
        tensors |= {_tensor_name(name, key): value for key, value in held.items()}
    return tensors, {"format": state_format(optimizer), "parameters": parameters}


def load_optimizer_state(
    optimizer: Optimizer, names: dict[Parameter, str], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` gave, to the bit, on whatever device the parameters are now.

    Raises:
        CheckpointError: if the state belongs to another optimizer or to other parameters; nothing is then
            loaded.
    """
    parameters = {names[parameter]: parameter for parameter in _parameters(optimizer.param_groups)}
    problems = list(_state_problems(state_format(optimizer), parameters, tensors, scalars))
    if problems:
        raise CheckpointError("The optimizer state cannot be loaded:", problems)
    optimizer.state.clear()
    shared: dict[tuple[str, torch.device], Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = scalars["parameters"][names[parameter]]
            state: dict[str, Any] = dict(entry["numbers"])
            for key in entry["tensors"]:
                saved = tensors[_tensor_name(names[parameter], key)]
                if _is_shared(key):
                    place = (key, parameter.device)
                    state[key] = shared.setdefault(place, saved.to(parameter.device))
                else:
                    state[key] = _placed(optimizer, group, parameter, key, saved)
            if state:
                optimizer.state[parameter] = state


def _placed(
    optimizer: Optimizer, group: dict[str, Any], parameter: Parameter, key: str, saved: Tensor
) -> Tensor:
    """A copy of `saved` where this optimizer wants it."""
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return saved.cpu().clone()
    if key.startswith("state") and hasattr(optimizer, "get_state_buffer"):
        # bitsandbytes' own allocation, so that state that was paged before is paged again.
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=saved.dtype)
        return buffer.copy_(saved)
    return saved.to(parameter.device, copy=True)


def _is_shared(key: str) -> bool:
    """Code books are constants that all 8-bit tensors of an optimizer use."""
    return key.startswith("qmap")


def _tensor_name(parameter: str, key: str) -> str:
    return f"shared.{key}" if _is_shared(key) else f"{parameter}.{key}"


def _state_problems(
    wanted: str, parameters: dict[str, Parameter], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> Iterable[str]:
    if scalars["format"] != wanted:
        yield (
            f"it was written by {scalars['format']} and this run uses {wanted}, whose state is another; "
            "resume on the kind of device it was written on, with the same optimizer.name."
        )
        return
    saved: dict[str, Any] = scalars["parameters"]
    remedy = "resume with the adapter it was written for"
    missing, foreign = sorted(parameters.keys() - saved), sorted(saved - parameters.keys())
    if missing:
        yield f"{_some(missing)} trained in this run but not in it; {remedy}."
    if foreign:
        yield f"{_some(foreign)} in it but not trained in this run; {remedy}."
    listed = {_tensor_name(name, key) for name, entry in saved.items() for key in entry["tensors"]}
    if unmatched := sorted(listed ^ tensors.keys()):
        yield f"{_some(unmatched)} on one side only, the list or the tensors; the checkpoint is not whole."
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq", "state1", "state2"):
            tensor = tensors.get(f"{name}.{key}")
            if tensor is not None and tensor.shape != parameter.shape:
                yield (
                    f"{name}.{key} has shape {list(tensor.shape)}, but the parameter has "
                    f"{list(parameter.shape)}; resume with the rank it was written for."
                )


def _some(names: list[str]) -> str:
    """Such as "a is", "a and b are", or "a, b and 12 more are"."""
    if len(names) == 1:
        return f"{names[0]} is"
    if len(names) == 2:
        return f"{names[0]} and {names[1]} are"
    return f"{names[0]}, {names[1]} and {len(names) - 2} more are"


def _parameters(groups: list[dict[str, Any]]) -> Iterable[Parameter]:
    return (parameter for group in groups for parameter in group["params"])


def _small_tensor_notes(groups: list[dict[str, Any]]) -> tuple[str, ...]:
    sizes = [parameter.numel() for parameter in _parameters(groups)]
    small = [size for size in sizes if size < MIN_8BIT_ELEMENTS]
    if not small:
        return ()
    share = sum(small) / sum(sizes)
    return (
        f"{len(small)} of {len(sizes)} trained tensors ({share:.0%} of the parameters) have fewer than "
        f"{MIN_8BIT_ELEMENTS} elements and keep 32-bit optimizer state.",
    )


def _without_kernels(
    name: str, groups: list[dict[str, Any]], settings: Settings, device: torch.device
) -> BuiltOptimizer:
    built = adamw(groups, settings, device)
    extra = 6 * sum(parameter.numel() for parameter in _parameters(groups))
    note = (
        f"bitsandbytes has no 8-bit kernels for {device.type}, so {name} runs as torch AdamW with 32-bit "
        f"state, which takes {extra / 2**20:,.1f} MiB more; set optimizer.name=adamw to say so yourself."
    )
    return BuiltOptimizer(built.optimizer, built.resolved, (note,))


def _bitsandbytes(device: torch.device) -> Any:
    """`bitsandbytes.optim`, imported only here because that takes seconds.

    Raises:
        ConfigError: if it is not installed or has no library for this machine.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about 4-bit kernels, which no optimizer uses
    try:
        optim = importlib.import_module("bitsandbytes.optim")
        library = type(importlib.import_module("bitsandbytes.cextension").lib).__name__
    except (ImportError, OSError, RuntimeError) as error:
        raise _no_bitsandbytes(str(error)) from error
    finally:
        log.setLevel(level)
    if library.startswith("ErrorHandlerMock") and device.type != "xpu":
        raise _no_bitsandbytes(f"it has no compiled library for this machine's {device.type}")
    return optim


def _no_bitsandbytes(why: str) -> ConfigError:
    return ConfigError(
        "The optimizer cannot be built:",
        [
            f"8-bit AdamW needs bitsandbytes, which cannot be used here ({why}); "
            "install it with `pip install bitsandbytes`, or set optimizer.name=adamw."
        ],
    )
