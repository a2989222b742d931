"""The state of any optimizer by parameter name: tensors for a safetensors file, numbers for a JSON document.

Learning rate and settings are not part of the state: they follow from the run and the step. Numbers that an optimizer
keeps per group, such as prodigy's estimate of the step size, are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from finetune.errors import CheckpointError

NOT_STATE = {
    "params", "lr", "initial_lr", "name", "fused", "foreach", "capturable", "maximize", "differentiable",
}  # fmt: skip
"""Entries of a parameter group that the run or the device decides."""


def parameters_of(groups: Iterable[dict[str, Any]]) -> Iterator[Parameter]:
    """All parameters in the order of their groups."""
    return (parameter for group in groups for parameter in group["params"])


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
        scalars: a JSON document: the format, per parameter its numbers and the keys of its tensors, and per group the
            numbers that have moved.
    """
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for parameter in parameters_of(optimizer.param_groups):
        name, state = names[parameter], optimizer.state.get(parameter, {})
        held = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
        parameters[name] = {
            "numbers": {key: value for key, value in state.items() if key not in held},
            "tensors": sorted(held),
        }
        tensors |= {_tensor_name(name, key): value for key, value in held.items()}
    groups = [_moved(group, optimizer.defaults) for group in optimizer.param_groups]
    return tensors, {"format": state_format(optimizer), "parameters": parameters, "groups": groups}


def load_optimizer_state(
    optimizer: Optimizer, names: dict[Parameter, str], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` gave, to the bit, on whatever device the parameters are now.

    Raises:
        CheckpointError: if the state belongs to another optimizer or to other parameters; nothing is then
            loaded.
    """
    parameters = {names[parameter]: parameter for parameter in parameters_of(optimizer.param_groups)}
    problems = list(_problems(state_format(optimizer), parameters, tensors, scalars))
    if problems:
        raise CheckpointError("The optimizer state cannot be loaded:", problems)
    optimizer.state.clear()
    shared: dict[tuple[str, torch.device], Tensor] = {}
    for group, moved in zip(optimizer.param_groups, scalars["groups"], strict=True):
        for key in _moved(group, optimizer.defaults):
            if key in optimizer.defaults:
                group[key] = optimizer.defaults[key]
            else:
                del group[key]
        group.update(moved)
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


def _moved(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a group that are no longer what they were at the start."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in NOT_STATE and _is_number(value) and not (key in defaults and value == defaults[key])
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _placed(
    optimizer: Optimizer, group: dict[str, Any], parameter: Parameter, key: str, saved: Tensor
) -> Tensor:
    """A copy of `saved` where this optimizer wants it."""
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return saved.cpu().clone()
    if key.startswith("state") and saved.shape == parameter.shape and hasattr(optimizer, "get_state_buffer"):
        # bitsandbytes' own allocation, so that state that was paged before is paged again.
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=saved.dtype)
        return buffer.copy_(saved)
    return saved.to(parameter.device, copy=True)


def _is_shared(key: str) -> bool:
    """Code books are constants that all 8-bit tensors of an optimizer use."""
    return key.startswith("qmap")


def _tensor_name(parameter: str, key: str) -> str:
    return f"shared.{key}" if _is_shared(key) else f"{parameter}.{key}"


def _problems(
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
            # keep: AdEMAMix holds its fast and its slow mean in one tensor of twice the size.
            if tensor is not None and tensor.shape not in (parameter.shape, (2, *parameter.shape)):
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
