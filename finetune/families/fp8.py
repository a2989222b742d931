"""Frozen layers that hold their weights in fp8 and compute in another number format, forwards and backwards.

diffusers' layerwise casting changes the weight in place around each forward, which the backward pass then finds in the
wrong format; here the backward pass unpacks the weight again, so nothing but one byte per weight is kept.
"""

from __future__ import annotations

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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None, None


class _Convolution(torch.autograd.Function):
    """The same for a two-dimensional convolution of one group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return functional.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), **settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        back = torch.nn.grad.conv2d_input(ctx.shape, weight.to(grads[0].dtype), grads[0], **ctx.settings)
        return back, None, None, None


class Fp8Linear(nn.Linear):
    """A linear layer with its weight in fp8."""

    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Linear`; the result is in `compute_dtype`."""
        return cast(Tensor, _Linear.apply(x.to(self.compute_dtype), self.weight, self.bias))


class Fp8Conv2d(nn.Conv2d):
    """A convolution with its weight in fp8."""

    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Conv2d`; the result is in `compute_dtype`."""
        settings = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return cast(Tensor, _Convolution.apply(x.to(self.compute_dtype), self.weight, self.bias, settings))


TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}
"""Layer -> its twin in fp8."""


def held_in_fp8(layer: nn.Module, dtype: torch.dtype) -> None:
    """Turn a frozen linear or convolution layer into its twin, in place; it computes in `dtype`."""
    held: Any = layer
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return
    # keep: numbers beyond the format's largest would become infinite or nan.
    limit = torch.finfo(FP8).max
    held.weight.data = held.weight.data.clamp(-limit, limit).to(FP8)
    held.__class__ = TWINS[type(layer)]
    held.compute_dtype = dtype
