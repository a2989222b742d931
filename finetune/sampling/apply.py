"""Put an adapter file on live networks without touching their weights, and take it off again.

The update runs beside each layer, unmerged: adding it to half-precision weights would round much of it away.
This is also the plainest statement of what an adapter means, and export measures every file it writes against
it. Weights trained whole take the base's place while they are applied, rounded to the base's number format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from finetune.adapters.files import DOWN, UP, AdapterFile
from finetune.adapters.tokens import words_applied
from finetune.adapters.updates import LORA, UPDATES, merged_bias, merged_weight
from finetune.errors import CheckpointError, first_few
from finetune.families.base import Components, ModelFamily
from finetune.families.text import installed_name

Hook = Callable[[nn.Module, Any, Tensor], Tensor]


def network(family: ModelFamily, components: Components, component: str) -> nn.Module | None:
    """The network an adapter's component name stands for; None if the base has no such network."""
    return components.denoiser if component == family.denoiser else components.text_encoders.get(component)


def adapter_targets(
    family: ModelFamily, components: Components, file: AdapterFile
) -> dict[tuple[str, str], nn.Module]:
    """(component, canonical layer name) -> the layer of the live network that the adapter changes.

    Raises:
        CheckpointError: if the adapter contradicts itself or does not fit this base; every misfit is listed.
    """
    if any(isinstance(layer, BaseTunerLayer) for root in components.modules().values() for layer in root.modules()):
        raise CheckpointError(
            f"These networks of {components.source!r} carry an adapter already, as those of a finished training do: "
            "they draw with it as they are, so apply none beside it.",
            ["to draw with the file, or at another strength, load the base anew: finetune.load_family(base)"],
        )
    found: dict[tuple[str, str], nn.Module] = {}
    problems = file.problems()
    for (component, name), tensors in file.layers().items() if not problems else ():
        whole = not UPDATES[file.header.method[component]].layouts
        layer = _layer(network(family, components, component), component, name, whole=whole)
        if layer is None:
            problems.append(f"{component}.{name}: the base has no such layer.")
            continue
        problems += _misfits(file, component, name, tensors, layer)
        found[component, name] = layer
    if problems:
        raise CheckpointError(
            f"The adapter does not fit the base {components.source!r}, but was made on {file.header.base!r}. "
            "Use the base it was trained on.",
            first_few(problems),
        )
    return found


@contextmanager
def adapter_applied(
    family: ModelFamily, components: Components, file: AdapterFile | None, strength: float = 1.0
) -> Iterator[None]:
    """While the block runs, the networks behave as if the adapter were attached; `None` changes nothing.

    Learned words are known to the components' tokenizers meanwhile. Several adapters add up when the blocks are nested,
    unless they hold weights trained whole.

    Args:
        strength: factor on what the adapter adds to each layer; 1 is as trained. Learned words stay as they are.

    Raises:
        CheckpointError: if the adapter does not fit this base.
    """
    with ExitStack() as stack:
        if file is not None:
            layers: dict[tuple[str, str], Any] = adapter_targets(family, components, file)
            for (component, name), tensors in file.layers().items():
                layer = layers[component, name]
                method, scale = file.header.method[component], file.scale(component, name)
                if not UPDATES[method].layouts:
                    stack.enter_context(_replaced(layer, tensors, strength))
                elif UPDATES[method].layouts == (LORA,):
                    device = layer.weight.device
                    hook = _low_rank(tensors[DOWN[1:]].to(device), tensors[UP[1:]].to(device), scale * strength)
                    stack.callback(layer.register_forward_hook(hook).remove)
                else:
                    hook = _change(file, (component, name), tensors, layer, strength)
                    stack.callback(layer.register_forward_hook(hook).remove)
            _apply_words(stack, components, file)
        yield


def _apply_words(stack: ExitStack, components: Components, file: AdapterFile) -> None:
    """Let text encoders and tokenizers know the file's words until the stack is left."""
    own = components.tokenizers
    knowing = dict(own)
    for name, encoder in components.text_encoders.items():
        if words := file.token_vectors(name):
            knowing[name] = stack.enter_context(words_applied(encoder, own[name], words))
    if file.header.tokens:
        stack.callback(setattr, components, "tokenizers", own)
        components.tokenizers = knowing


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


def _layer(network: nn.Module | None, component: str, name: str, *, whole: bool) -> Any:
    if network is None:
        return None
    try:
        layer = network.get_submodule(installed_name(network, component, name))
    except AttributeError:
        return None
    return layer if whole or isinstance(layer, (nn.Linear, nn.Conv2d)) else None


def _misfits(
    file: AdapterFile, component: str, name: str, tensors: Mapping[str, Tensor], layer: nn.Module
) -> list[str]:
    """Tensors that cannot be meant for this layer; only shapes are computed with."""
    method = file.header.method[component]
    if not UPDATES[method].layouts:
        own = dict(layer.named_parameters(recurse=False))
        return [
            f"{component}.{name}.{suffix} has shape {tuple(tensor.shape)}, the base's "
            f"{tuple(own[suffix].shape) if suffix in own else 'layer has none'}."
            for suffix, tensor in tensors.items()
            if suffix not in own or own[suffix].shape != tensor.shape
        ]
    shape = tuple(layer.weight.shape)
    if tensors.keys() >= LORA:
        down, up = tensors[DOWN[1:]], tensors[UP[1:]]
        if (up.shape[0], *down.shape[1:]) != shape:
            return [f"{component}.{name}: the update is {(up.shape[0], *down.shape[1:])}, the layer {shape}."]
    empty = {suffix: tensor.to("meta") for suffix, tensor in tensors.items()}
    try:
        new = merged_weight(method, empty, torch.empty(shape, device="meta"), 1.0, file.header.options)
    except (RuntimeError, ValueError) as error:
        return [f"{component}.{name}: {str(error).splitlines()[0]}; the layer is {shape}."]
    return [] if new.shape == shape else [f"{component}.{name}: the new weight is {tuple(new.shape)}, not {shape}."]


def _low_rank(down: Tensor, up: Tensor, scale: float) -> Hook:
    def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        narrow = inputs[0].to(down.dtype)
        # keep: a text encoder may have moved to another device since the adapter was applied.
        first, second = down.to(narrow.device), up.to(narrow.device)
        if isinstance(layer, nn.Conv2d):
            # The layer's own stride, padding and padding mode belong to the first half of the update.
            change = functional.conv2d(layer._conv_forward(narrow, first, None), second)
        else:
            change = functional.linear(functional.linear(narrow, first), second)
        return output + (change * scale).to(output.dtype)

    return add


def _change(
    file: AdapterFile, place: tuple[str, str], tensors: Mapping[str, Tensor], layer: Any, strength: float
) -> Hook:
    """What the new weight and bias add to the layer's output, held in fp32."""
    method = file.header.method[place[0]]
    new = merged_weight(method, tensors, layer.weight, file.scale(*place), file.header.options)
    delta = (new - layer.weight.detach().float()) * strength
    bias = merged_bias(method, tensors, layer.bias)
    shift = None if bias is None else (bias - layer.bias.detach().float()) * strength

    def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        wide = inputs[0].to(delta.dtype)
        moved, added = delta.to(wide.device), None if shift is None else shift.to(wide.device)
        if isinstance(layer, nn.Conv2d):
            change = layer._conv_forward(wide, moved, added)
        else:
            change = functional.linear(wide, moved, added)
        return output + change.to(output.dtype)

    return add


@contextmanager
def _replaced(layer: nn.Module, tensors: Mapping[str, Tensor], strength: float) -> Iterator[None]:
    """The layer with other parameters, in its own number format; its own are back to the bit afterwards."""
    own = {suffix: getattr(layer, suffix) for suffix in tensors}
    kept = {suffix: parameter.data for suffix, parameter in own.items()}
    try:
        for suffix, parameter in own.items():
            new = tensors[suffix].to(parameter.device)
            new = new if strength == 1 else torch.lerp(parameter.data.to(new.dtype), new, strength)
            parameter.data = new.to(parameter.dtype)
        yield
    finally:
        for suffix, parameter in own.items():
            parameter.data = kept[suffix]
