"""bitsandbytes: where it has 8-bit kernels, what stays in 32 bits, and what to do when it is missing."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from finetune.errors import ConfigError
from finetune.training.optimizer_state import parameters_of

DEVICES = ("cpu", "cuda", "xpu")
"""Where bitsandbytes 0.50 has 8-bit kernels; ROCm calls itself cuda."""
MIN_ELEMENTS = 1024
"""Smaller tensors keep 32-bit state. bitsandbytes' own 4096 would leave half of a small LoRA (rank 4 on SD1.5) in
32 bits; state is quantised in blocks of 256, so four blocks are enough to be worth it."""
MIN_PAGED_ELEMENTS = 100_000
"""bitsandbytes pages the state of larger tensors only."""


def optimizers_for(device: torch.device) -> Any:
    """`bitsandbytes.optim`, imported only here because that takes seconds.

    Raises:
        ConfigError: if it is not installed or has no library for this machine.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about 4-bit kernels, which no optimizer uses
    try:
        optim = importlib.import_module("bitsandbytes.optim")
        compiled = type(importlib.import_module("bitsandbytes.cextension").lib).__name__
    except (ImportError, OSError, RuntimeError) as error:
        raise _missing(str(error)) from error
    finally:
        log.setLevel(level)
    if compiled.startswith("ErrorHandlerMock") and device.type != "xpu":
        raise _missing(f"it has no compiled library for this machine's {device.type}")
    return optim


def notes(name: str, groups: list[dict[str, Any]], device: torch.device) -> tuple[str, ...]:
    """What of the state is not in 8 bits after all, and what it costs on a CPU."""
    found = []
    sizes = [parameter.numel() for parameter in parameters_of(groups)]
    small = [size for size in sizes if size < MIN_ELEMENTS]
    if small:
        found.append(
            f"{len(small)} of {len(sizes)} trained tensors ({sum(small) / sum(sizes):.0%} of the parameters) have "
            f"fewer than {MIN_ELEMENTS} elements and keep 32-bit optimizer state."
        )
    if device.type == "cpu":
        found.append(f"{name} on a CPU is slower than adamw; it saves memory only.")
    return tuple(found)


def paging_notes(groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """Whether anything is large enough to be paged."""
    if any(parameter.numel() >= MIN_PAGED_ELEMENTS for parameter in parameters_of(groups)):
        return ()
    return (f"paged_adamw8bit pages nothing here: no tensor has {MIN_PAGED_ELEMENTS:,} elements.",)


def _missing(why: str) -> ConfigError:
    return ConfigError(
        "The optimizer cannot be built:",
        [
            f"8-bit optimizers need bitsandbytes, which cannot be used here ({why}); "
            "install it with `pip install bitsandbytes`, or set optimizer.name=adamw."
        ],
    )
