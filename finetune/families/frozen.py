"""Frozen layers that hold their weights otherwise than they compute: in one byte, or in the machine's main memory.

The weight is brought to where and what the layer computes in for each forward pass, and again for each backward pass;
nothing but the held weight is kept. diffusers exchanges the parameter's content around each forward pass (layerwise
casting, group offloading), which the backward pass then finds in the wrong format, in the wrong place or gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

FP8 = torch.float8_e4m3fn
"""Four bits of exponent, three of fraction; the largest number is 448. Source: Micikevicius et al. 2022,
arXiv:2209.05433."""


class _Linear(torch.autograd.Function):
    """x W^T + b for a frozen W; only x gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, _brought(weight, scale, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, scale = ctx.saved_tensors
        return grads[0] @ _brought(weight, scale, grads[0]), None, None, None


class _Convolution(torch.autograd.Function):
    """The same for a two-dimensional convolution of one group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, settings: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.settings = x.shape, settings
        return functional.conv2d(x, _brought(weight, scale, x), None if bias is None else bias.to(x.dtype), **settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, scale = ctx.saved_tensors
        back = torch.nn.grad.conv2d_input(ctx.shape, _brought(weight, scale, grads[0]), grads[0], **ctx.settings)
        return back, None, None, None, None


def _brought(weight: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    """The weight where and in what `like` is."""
    if scale is not None:
        # keep: the product in fp32; a scale rounded to 16 bits would be off for a whole row at once.
        return (weight * scale).to(like.dtype)
    return weight.to(like.device, like.dtype, non_blocking=True)


class FrozenLinear(nn.Linear):
    """A linear layer that computes in another number format than it holds its weight in."""

    compute_dtype: torch.dtype
    scale: Tensor | None
    """What each row of a weight in whole numbers is multiplied by; None: it is held as the numbers it means."""

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Linear`; the result is in `compute_dtype`."""
        return cast(Tensor, _Linear.apply(x.to(self.compute_dtype), self.weight, self.scale, self.bias))


class FrozenConv2d(nn.Conv2d):
    """The same for a convolution."""

    compute_dtype: torch.dtype
    scale: Tensor | None

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """A plain convolution where one is made anew: PEFT makes its own of the type that it finds."""
        # keep: without arguments it is a copy that is being filled.
        return nn.Conv2d(*arguments, **named) if arguments or named else super().__new__(cls)

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Conv2d`; the result is in `compute_dtype`."""
        settings = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        found = _Convolution.apply(x.to(self.compute_dtype), self.weight, self.scale, self.bias, settings)
        return cast(Tensor, found)


@dataclass(frozen=True)
class Resident:
    """A weight that is no parameter, so that nothing which moves, splits, counts or copies a network touches it."""

    weight: Tensor

    def __deepcopy__(self, memo: Any) -> Resident:
        """The same: it never changes."""
        return self


class HostLinear(FrozenLinear):
    """A linear layer whose weight stays in the machine's main memory."""

    resident: Resident

    @property
    def weight(self) -> Tensor:
        """The weight where it is held, which may be another device than the layer computes on."""
        return self.resident.weight


class HostConv2d(FrozenConv2d):
    """The same for a convolution."""

    resident: Resident

    @property
    def weight(self) -> Tensor:
        """See `HostLinear`."""
        return self.resident.weight


FROZEN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}
"""Layer -> its twin that computes in another number format."""
HOST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HostLinear, nn.Conv2d: HostConv2d}
"""Layer -> its twin whose weight stays in main memory."""


def can_be_held(layer: nn.Module) -> bool:
    """Whether there is a twin of this very layer."""
    plain = not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")
    return type(layer) in FROZEN and plain


def held_in_fp8(layer: nn.Module, dtype: torch.dtype) -> None:
    """Turn a layer that `can_be_held` into one with its weight in fp8, in place; it computes in `dtype`."""
    held: Any = layer
    # keep: numbers beyond the format's largest would become infinite or nan.
    limit = torch.finfo(FP8).max
    held.weight.data = held.weight.data.clamp(-limit, limit).to(FP8)
    _becomes(layer, FROZEN, dtype)


def held_in_int8(layer: nn.Module, dtype: torch.dtype) -> None:
    """The same with its weight as whole numbers from -127 to 127, and for each output what one of them means.

    Source: the vector-wise quantization of Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, of weights alone.
    """
    held: Any = layer
    weight = held.weight.detach().float()
    largest = weight.flatten(1).abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (largest / 127).view(-1, *[1] * (weight.ndim - 1))
    held.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
    _becomes(layer, FROZEN, dtype, scale)


def held_on_host(layer: nn.Module, dtype: torch.dtype) -> None:
    """Turn a layer that `can_be_held` into one whose weight stays in main memory, in place; it computes in `dtype`."""
    held: Any = layer
    weight = held._parameters.pop("weight").detach().to("cpu", dtype)
    # keep: from page-locked memory a GPU fetches at twice the speed.
    held.resident = Resident(weight.pin_memory() if torch.cuda.is_available() else weight)
    _becomes(layer, HOST, dtype)


def _becomes(
    layer: nn.Module, twins: dict[type[nn.Module], type[nn.Module]], dtype: torch.dtype, scale: Tensor | None = None
) -> None:
    held: Any = layer
    held.__class__ = twins[type(layer)]
    held.compute_dtype = dtype
    held.register_buffer("scale", scale)


def host_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights that stay in main memory."""
    return sum(part.weight.nbytes for part in network.modules() if isinstance(part, HostLinear | HostConv2d))


def let_go_host(network: nn.Module) -> None:
    """Free the weights that stay in main memory; their shapes stay."""
    for part in network.modules():
        if isinstance(part, HostLinear | HostConv2d):
            part.resident = Resident(part.weight.to("meta"))
