"""What makes drawing faster and leaves the picture as it is, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from finetune.errors import ConfigError

REPEATED = "TransformerBlock"
"""What diffusers' names of the blocks end in that every denoiser repeats."""


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Channels last, in place, where tensor cores read convolutions so: in half precision on a GPU.

    On CPUs it gains nothing; see docs/experiments.md.
    """
    if device.type == "cuda" and next(network.parameters()).dtype.itemsize == 2:
        network.to(memory_format=torch.channels_last)


@contextmanager
def compiled(network: nn.Module) -> Iterator[None]:
    """The blocks that a denoiser repeats run as compiled code for as long as the context lasts.

    One block of each shape is compiled and serves all; the whole network would take many times as long. Adapters must
    be applied before: compiled code does not see what is hooked on later.
    """
    blocks: list[Any] = [part for part in network.modules() if type(part).__name__.endswith(REPEATED)]
    # keep: each block may have its own adapter's width, and beyond the limit blocks would silently stay as they are.
    with torch._dynamo.config.patch(recompile_limit=len(blocks) + 8):
        for block in blocks:
            block.compile()
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
            torch._dynamo.reset()


def check_compiler(device: torch.device) -> None:
    """Compile something small, before anything large is loaded.

    Raises:
        ConfigError: if this machine cannot compile, with the reason.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # compilers fail in many ways, of their own and of the system's
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = (str(root).strip().splitlines() or [type(root).__name__])[0]
        raise ConfigError(
            f"--compile needs a compiler for {device.type}, and there is none that works: {reason}",
            ["leave --compile out: the picture is the same", "for CPUs install g++, for NVIDIA GPUs triton"],
        ) from error
    finally:
        torch._dynamo.reset()
