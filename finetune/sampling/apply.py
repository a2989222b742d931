"""Put an adapter file on live networks without touching their weights, and take it off again.

The update runs beside each layer, unmerged: adding it to half-precision weights would round much of it away.
This is also the plainest statement of what an adapter means, and export measures every file it writes against
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from finetune.adapters.files import AdapterFile
from finetune.errors import CheckpointError
from finetune.families.base import Components, ModelFamily
from finetune.families.text import installed_name

SHOWN = 8
"""At most so many problems of one kind are listed."""


def network(family: ModelFamily, components: Components, component: str) -> nn.Module | None:
    """The network an adapter's component name stands for; None if the base has no such network."""
    return components.denoiser if component == family.denoiser else components.text_encoders.get(component)


def adapter_targets(
    family: ModelFamily, components: Components, file: AdapterFile
) -> dict[tuple[str, str], nn.Module]:
    """(component, canonical module name) -> the layer of the live network that the adapter changes.

    Raises:
        CheckpointError: if the adapter contradicts itself or does not fit this base; every misfit is listed.
    """
    found: dict[tuple[str, str], nn.Module] = {}
    problems = file.problems()
    for component, module, down, up in file.modules():
        layer = _layer(network(family, components, component), component, module)
        if layer is None:
            problems.append(f"{component}.{module}: the base has no such layer.")
            continue
        shape = tuple(layer.weight.shape)
        if (up.shape[0], *down.shape[1:]) != shape:
            problems.append(
                f"{component}.{module}: the update is {(up.shape[0], *down.shape[1:])}, the layer {shape}."
            )
        found[component, module] = layer
    if problems:
        more = [f"and {len(problems) - SHOWN} more."] if len(problems) > SHOWN else []
        raise CheckpointError(
            f"The adapter does not fit the base {components.source!r}, but was made on {file.header.base!r}. "
            "Use the base it was trained on, with no other adapter attached.",
            [*problems[:SHOWN], *more],
        )
    return found


@contextmanager
def adapter_applied(family: ModelFamily, components: Components, file: AdapterFile | None) -> Iterator[None]:
    """While the block runs, the networks behave as if the adapter were attached; `None` changes nothing.

    Raises:
        CheckpointError: if the adapter does not fit this base.
    """
    with ExitStack() as stack:
        if file is not None:
            layers = adapter_targets(family, components, file)
            for component, module, down, up in file.modules():
                layer = layers[component, module]
                device = layer.weight.device
                hook = _update(down.to(device), up.to(device), file.scale(component))
                stack.callback(layer.register_forward_hook(hook).remove)
        yield


@contextmanager
def evaluating(components: Components) -> Iterator[None]:
    """Every network in evaluation mode; afterwards each module is as it was, whatever mixture that is."""
    modes = [(module, module.training) for root in components.modules().values() for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _layer(network: nn.Module | None, component: str, module: str) -> Any:
    if network is None:
        return None
    try:
        layer = network.get_submodule(installed_name(network, component, module))
    except AttributeError:
        return None
    return layer if isinstance(layer, (nn.Linear, nn.Conv2d)) else None


def _update(down: Tensor, up: Tensor, scale: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        narrow = inputs[0].to(down.dtype)
        if isinstance(layer, nn.Conv2d):
            # The layer's own stride, padding and padding mode belong to the first half of the update.
            change = functional.conv2d(layer._conv_forward(narrow, down, None), up)
        else:
            change = functional.linear(functional.linear(narrow, down), up)
        return output + (change * scale).to(output.dtype)

    return add
