"""Checkpoints on machines that die and disks that fill: a whole one is always left."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.errors import StorageError
from finetune.training import checkpoint
from finetune.training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from tests.checkpoints import (
    assert_whole,
    calls_of_one_save,
    in_child,
    intercept,
    names,
    save,
    weights_at,
)


def test_killed_at_every_point_of_the_write(tmp_path: Path) -> None:
    """SIGKILL ahead of each system call of a save; what was not yet fsynced is torn in half, as by a power
    cut.
    """
    start = tmp_path / "start"
    save(start, 1, small=True)
    points = calls_of_one_save(start)
    assert points > 30
    seen = []
    for point in range(1, points + 1):
        folder = tmp_path / str(point)
        shutil.copytree(start, folder)

        def work(point: int = point, folder: Path = folder) -> None:
            def die(number: int, name: str, args: tuple[Any, ...]) -> None:
                if number == point:
                    if name == "fsync" and not _is_folder(args[0]):
                        os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

            intercept(die, pytest.MonkeyPatch())
            save(folder, 2, keep=1, small=True)

        assert in_child(work) == -signal.SIGKILL, point
        found = latest_checkpoint(folder)
        assert found is not None and found.skipped == (), point
        assert_whole(folder, found.state.step)
        seen.append(found.state.step)
        save(folder, 2, keep=1, small=True)
        assert names(folder) == ["checkpoint-000002"], point
    assert seen == sorted(seen) and set(seen) == {1, 2}


def _is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def test_killed_at_random_times(tmp_path: Path) -> None:
    """A run killed twenty times is, step for step and bit for bit, the run that was never killed."""
    draw = random.Random(0)
    started = time.perf_counter()
    save(tmp_path / "trial", 1)
    seconds = time.perf_counter() - started  # a save here and now; kills fall within the first few
    folder, (read, write) = tmp_path / "run", os.pipe()

    def work() -> None:
        found = latest_checkpoint(folder)
        step = 0 if found is None else found.state.step
        weights = weights_at(0) if found is None else found.tensors["adapter"]["unet.lora_A.weight"]
        os.write(write, b"!")
        while True:
            weights = weights * 0.9 + step
            step += 1
            save(folder, step, keep=1, weights=weights)

    def kill(pid: int) -> None:
        os.read(read, 1)
        time.sleep(draw.uniform(0, 4 * seconds))
        os.kill(pid, signal.SIGKILL)

    steps = [0]
    for _ in range(20):
        assert in_child(work, kill) == -signal.SIGKILL
        found = latest_checkpoint(folder)
        steps.append(0 if found is None else found.state.step)
        assert found is None or found.skipped == ()
    os.close(read)
    os.close(write)
    assert steps == sorted(steps) and steps[-1] >= 3
    assert_whole(folder, steps[-1])


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Limit what can be written below `folder`: a tmpfs where mounting is allowed, else a limit on file
    sizes.
    """
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    mount = shutil.which("mount") or "false"
    mounted = subprocess.run([mount, *options], capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_room_on_the_disk_is_asked_before_a_byte_is_written(tmp_path: Path, monkeypatch) -> None:
    """Code 5 with what is needed and what is free; the previous checkpoint is not even looked at."""
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=(1 << 20) + 7999))
    with pytest.raises(StorageError) as caught:
        save_checkpoint(tmp_path, TrainState(2, 8, 0, 1.0), {"adapter": {"w": torch.ones(2000)}}, {}, keep=1)
    assert caught.value.exit_code == 5
    assert "checkpoint-000002 cannot be saved; untouched on disk: checkpoint-000001" in str(caught.value)
    assert "free some space" in str(caught.value)
    assert names(tmp_path) == ["checkpoint-000001"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=(1 << 20) + 8000))
    save_checkpoint(tmp_path, TrainState(2, 8, 0, 1.0), {"adapter": {"w": torch.ones(2000)}}, {}, keep=1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, share: float, monkeypatch) -> None:
    """Somebody else fills the disk while we write: code 5, the bytes, and nothing half-written stays behind."""
    monkeypatch.setattr(checkpoint, "check_room", lambda *ignored: None)
    folder, large = tmp_path / "disk", torch.ones(100_000)
    size = 60_000 + int(800_000 * share)
    with small_disk(folder, size):
        save(folder, 1)
        if not os.path.ismount(folder):
            pytest.skip("only root can mount a small disk; the tests below fail each write and each call for everybody")
        with pytest.raises(StorageError) as caught:
            save_checkpoint(
                folder, TrainState(2, 8, 0, 1.0), {"adapter": {"w": large}, "ema": {"w": large}}, {}, keep=1
            )
        text = str(caught.value)
        assert caught.value.exit_code == 5
        assert "checkpoint-000002 cannot be saved; untouched on disk: checkpoint-000001" in text
        assert "No space left on device" in text and "bytes are free" in text
        assert names(folder) == ["checkpoint-000001"]
        assert_whole(folder, 1)


def test_a_file_that_cannot_grow_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """The write itself fails at byte k, for k through the whole save."""
    largest = max(file.stat().st_size for file in save(tmp_path, 1).iterdir())
    for limit in (0, 1, 100, 1000, largest - 1):

        def work(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(tmp_path, 2)

        assert in_child(work) == StorageError.exit_code, limit
        assert names(tmp_path) == ["checkpoint-000001"]
        assert_whole(tmp_path, 1)


def test_an_error_at_every_call_keeps_a_whole_checkpoint(tmp_path: Path) -> None:
    """Each system call of a save fails once as on a full disk: a StorageError, or all is well."""
    start = tmp_path / "start"
    save(start, 1, small=True)
    refused = 0
    for point in range(1, calls_of_one_save(start) + 1):
        folder = tmp_path / str(point)
        shutil.copytree(start, folder)

        def fail(number: int, name: str, args: tuple[Any, ...], point: int = point) -> None:
            if number == point:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        wanted = 2
        with pytest.MonkeyPatch.context() as patch:
            intercept(fail, patch)
            try:
                save(folder, 2, keep=1, small=True)
            except StorageError:
                refused, wanted = refused + 1, 1
        found = latest_checkpoint(folder)
        assert found is not None and found.skipped == () and found.state.step >= wanted, point
        assert_whole(folder, found.state.step)
        save(folder, 2, keep=1, small=True)
        assert names(folder) == ["checkpoint-000002"], point
    assert refused > 20
