"""Where networks are while they are not needed in the step: off the accelerator, or nowhere."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn


@contextlib.contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Networks on `device` for as long as the context lasts, back where each was afterwards."""
    before = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, before, strict=True):
            module.to(home)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: the accelerator's, for torch or for a library under it, or the machine's."""
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in said)


def let_go(modules: Iterable[nn.Module]) -> None:
    """Free the weights of networks whose turn is over; their shapes and configurations stay."""
    for module in modules:
        nn.Module.to(module, "meta")
    # keep: others may have shared these weights, and modules are freed by the collector alone.
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        # keep: glibc holds on to what was freed in pieces below 32 MB, which is most of a model.
        trim(0)
