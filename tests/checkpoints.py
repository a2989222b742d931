"""Checkpoints to test with: what a step must hold, and children whose disk calls fail or kill them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.errors import StorageError
from finetune.training.checkpoint import TrainState, latest_checkpoint, save_checkpoint

FILES = [
    "adapter.safetensors",
    "ema.safetensors",
    "manifest.json",
    "optimizer.json",
    "optimizer.safetensors",
    "run.json",
    "state.json",
]
SYSTEM_CALLS = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")
"""Everything in `os` that changes the disk on the way of a checkpoint."""


def weights_at(step: int) -> Tensor:
    """The weights of a run in which every step depends on all before it."""
    weights = torch.arange(600, dtype=torch.float32).view(20, 30)
    for i in range(step):
        weights = weights * 0.9 + i
    return weights


def state_at(step: int) -> TrainState:
    return TrainState(step, samples_seen=4 * step, epoch=step // 3, seconds=0.5 * step)


def save(
    folder: Path, step: int, keep: int = 2, weights: Tensor | None = None, small: bool = False
) -> Path:
    """A checkpoint of `weights`; `small` leaves out what has no part in a test of many saves."""
    weights = weights_at(step) if weights is None else weights
    tensors = {
        "adapter": {"unet.lora_A.weight": weights, "unet.lora_B.weight": weights.bfloat16()},
        "optimizer": {"unet.lora_A.weight.state1": (weights * 7).to(torch.uint8)},
        "ema": {"unet.lora_A.weight": weights / 2},
    }
    documents: dict[str, Any] = {"run": {"adapter": {"rank": 16}}, "optimizer": {"step": step}}
    if small:
        tensors, documents = {"adapter": tensors["adapter"]}, {}
    return save_checkpoint(folder, state_at(step), tensors, documents, keep)


def assert_whole(folder: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, and every number in it is right."""
    found = latest_checkpoint(folder)
    assert found is not None and found.state == state_at(step)
    assert torch.equal(found.tensors["adapter"]["unet.lora_A.weight"], weights_at(step))
    assert torch.equal(found.tensors["adapter"]["unet.lora_B.weight"], weights_at(step).bfloat16())
    if "ema" in found.tensors:
        assert torch.equal(found.tensors["ema"]["unet.lora_A.weight"], weights_at(step) / 2)
        assert found.documents["optimizer"] == {"step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(work: Callable[[], None], while_running: Callable[[int], None] = lambda pid: None) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        except StorageError:
            code = StorageError.exit_code
        finally:
            os._exit(code)
    while_running(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def intercept(before: Callable[[int, str, tuple[Any, ...]], None], patch: pytest.MonkeyPatch) -> None:
    """Call `before(number, name, arguments)` ahead of every system call that changes the disk."""
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            before(count, name, args)
            return real(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        patch.setattr(os, name, wrap(name))


def calls_of_one_save(folder: Path) -> int:
    """How many such calls a save in a copy of `folder` makes."""
    copy, numbers = folder.with_name("dry"), [0]
    shutil.copytree(folder, copy)
    with pytest.MonkeyPatch.context() as patch:
        intercept(lambda number, name, args: numbers.append(number), patch)
        save(copy, 2, keep=1, small=True)
    return numbers[-1]
