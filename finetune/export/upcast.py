"""Networks whose weights stay in half precision and that compute in fp32: one layer is upcast at a time.

A base of 6.5 GB in fp16 thus needs 6.5 GB, and says to the bit what its fp32 copy of twice the size would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

HALF = {torch.float16, torch.bfloat16}
PEEKED = "base_layer"
"""What adapters of PEFT call the layer they wrap, whose weight some of them read themselves."""


@contextmanager
def computing_in_fp32(network: nn.Module) -> Iterator[None]:
    """While the block runs, every layer of the network with weights in half precision computes in fp32."""
    # keep: T5 looks at the number format of these layers before it calls them.
    peeked = {PEEKED, *(getattr(network, "_keep_in_fp32_modules", None) or ())}
    owners: dict[nn.Module, list[nn.Module]] = {}
    for path, layer in network.named_modules():
        if any(parameter.dtype in HALF for parameter in layer.parameters(recurse=False)):
            parent, _, name = path.rpartition(".")
            owners.setdefault(network.get_submodule(parent) if name in peeked else layer, []).append(layer)
    with ExitStack() as stack:
        for owner, layers in owners.items():
            hooks = _Upcast(layers)
            stack.callback(owner.register_forward_pre_hook(hooks.upcast).remove)
            stack.callback(owner.register_forward_hook(hooks.restore, always_call=True).remove)
        yield


class _Upcast:
    """Some layers, and their own parameters while others stand in for them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._own: list[tuple[nn.Module, str, nn.Parameter]] = []

    def upcast(self, owner: nn.Module, inputs: Any) -> None:
        """Before the forward pass."""
        for layer in self._layers:
            for name, parameter in layer._parameters.items():
                if parameter is not None and parameter.dtype in HALF:
                    self._own.append((layer, name, parameter))
        for layer, name, parameter in self._own:
            layer._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)

    def restore(self, owner: nn.Module, inputs: Any, output: Any) -> None:
        """After it, whatever it came to."""
        while self._own:
            layer, name, parameter = self._own.pop()
            layer._parameters[name] = parameter
