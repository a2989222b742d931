"""A network with one layer of every kind that adapters know, and what attaches adapters to it."""

from __future__ import annotations

import torch
from torch import nn

from finetune.adapters import METHODS, Block, Shape, Target, Wish, attach, plan_layers


class Net(nn.Module):
    """Linear layers with and without bias, a strided 3x3 convolution and a 1x1 one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.plain = nn.Linear(16, 8, bias=False)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, rows, picture):
        return self.norm(self.plain(self.linear(rows))), self.point(self.conv(picture))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net()


def inputs():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(5, 8, generator=generator), torch.randn(2, 4, 6, 6, generator=generator)


def wish(method, pattern=".*", *, rank=4, alpha=None, rate=1e-3, conv=None, blocks=(), **shape) -> Wish:
    if alpha is None:
        alpha = 2.0 if METHODS[method].per_layer else float(rank)
    return Wish("adapter", pattern, pattern, method, Shape(rank, alpha, **shape), rate, conv, blocks)


def plan(module, asked):
    """(layers, problems) of a wish on a module whose names are canonical already."""
    return plan_layers(asked, "unet", module, str)


def adapted(module, asked, *, seed=0, share=1.0):
    """An adapter set on the module, as `asked`."""
    layers, problems = plan(module, asked)
    assert not problems, problems
    return attach([Target("unet", module, asked.method, asked.shape, layers, str, share)], seed)


def disturb(adapters, size=0.1):
    """Stand-in for training: no tensor is where it started."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.named_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return adapters


def file_of(adapters):
    return adapters.to_file(
        adapters.state(), family="sd1", base="net", base_digest="", trigger_words=(), run_digest="", step=1
    )


LAYERS = r"linear|plain|conv|point"
SMALL = r"linear|plain|point"
__all__ = ["LAYERS", "SMALL", "Block", "adapted", "disturb", "file_of", "inputs", "net", "plan", "wish"]
