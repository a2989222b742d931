"""Checkpoints survive kills at any moment, full disks and damaged bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.errors import CheckpointError, StorageError
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


def test_round_trip(tmp_path: Path) -> None:
    """What is read is what was written, to the bit, in files anyone may read."""
    path = save(tmp_path, 500)
    assert path.name == "checkpoint-000500" and names(path) == FILES
    assert_whole(tmp_path, 500)
    assert names(tmp_path) == ["checkpoint-000500"]
    umask = os.umask(0)
    os.umask(umask)
    assert all(file.stat().st_mode & 0o777 == 0o666 & ~umask for file in path.iterdir())


def test_nothing_there_is_none(tmp_path: Path) -> None:
    """A first start is not an error."""
    assert latest_checkpoint(tmp_path / "new") is None
    assert latest_checkpoint(tmp_path) is None


def test_order_is_by_step_never_by_time(tmp_path: Path) -> None:
    """Clocks jump; copies get new times; 1,000,000 comes after 999,999 although it sorts before it as text.
    """
    for step in (1_000_000, 999_999, 20):
        save(tmp_path, step, keep=9, weights=torch.ones(2))
    for age, step in enumerate((1_000_000, 999_999, 20)):
        os.utime(tmp_path / f"checkpoint-{step:06d}", (age, age))
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 1_000_000


def test_foreign_entries_are_ignored_and_kept(tmp_path: Path) -> None:
    """People and programs put things beside checkpoints."""
    save(tmp_path, 1)
    for name in ("checkpoint-best", "checkpoint-000009.bak", "checkpoint-7", "metrics"):
        (tmp_path / name).mkdir()
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "checkpoint-000900").write_text("a file, not a folder")
    foreign = set(names(tmp_path)) - {"checkpoint-000001"}
    assert_whole(tmp_path, 1)
    save(tmp_path, 2, keep=1)
    assert_whole(tmp_path, 2)
    assert set(names(tmp_path)) == foreign | {"checkpoint-000002"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_stay(tmp_path: Path, keep: int) -> None:
    """Old ones go, but never the one just written."""
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"checkpoint-{step:06d}" for step in (10, 20, 30, 40)[-keep:]]


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    """After falling back from step 9 to 5, the checkpoint of step 6 is the best there is."""
    save(tmp_path, 5)
    (save(tmp_path, 9) / "adapter.safetensors").write_bytes(b"")
    save(tmp_path, 6, keep=1)
    assert_whole(tmp_path, 6)
    save(tmp_path, 9, keep=1)
    assert_whole(tmp_path, 9)
    assert names(tmp_path) == ["checkpoint-000009"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(data))
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_is_named_and_the_previous_checkpoint_used(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    """A flipped bit in a weight trains on without any error; only a digest shows it."""
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / file)
    assert_whole(tmp_path, 1)
    found = latest_checkpoint(tmp_path)
    assert found is not None and len(found.skipped) == 1
    assert found.skipped[0].startswith(f"checkpoint-000002/{file} is ")


def test_every_single_bit_of_every_file_counts(tmp_path: Path) -> None:
    """200 random flips over all files: none goes unnoticed, or it changed nothing that is read."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    before = json.loads((path / "manifest.json").read_text())
    draw = random.Random(0)
    for _ in range(200):
        file = path / draw.choice(FILES)
        good = file.read_bytes()
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(data))
        try:
            found = latest_checkpoint(tmp_path)
            noticed = found is not None and found.state.step == 1
        except CheckpointError:
            noticed = True  # the flip made it another format version
        assert noticed or json.loads(file.read_text()) == before
        file.write_bytes(good)
    assert_whole(tmp_path, 2)


def test_nothing_whole_is_an_error_that_lists_everything(tmp_path: Path) -> None:
    """Starting afresh without a word would throw the run away."""
    flip(save(tmp_path, 1) / "adapter.safetensors")
    (save(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        latest_checkpoint(tmp_path)
    assert caught.value.exit_code == 4
    assert "checkpoint-000002/state.json is missing" in caught.value.problems[0]
    assert "checkpoint-000001/adapter.safetensors is damaged" in caught.value.problems[1]


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    """The folder's name decides the order, so it must be true."""
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "checkpoint-000077")
    assert_whole(tmp_path, 1)


def test_another_format_is_refused_not_skipped(tmp_path: Path) -> None:
    """Falling back behind a newer version's checkpoint would lose its work silently."""
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="written in format 2, and this version reads format 1"):
        latest_checkpoint(tmp_path)


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


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, share: float) -> None:
    """Code 5 with the bytes needed and free; nothing half-written stays behind."""
    folder, large = tmp_path / "disk", torch.ones(100_000)
    size = 60_000 + int(800_000 * share)
    with small_disk(folder, size):
        save(folder, 1)
        if not os.path.ismount(folder):
            pytest.skip("no file system can be mounted here; the file-size limit below covers it")
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


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    """A whole checkpoint is never replaced, so no kill can lose it; a damaged one is."""
    path = save(tmp_path, 3)
    inode = (path / "adapter.safetensors").stat().st_ino
    save(tmp_path, 3)
    assert (path / "adapter.safetensors").stat().st_ino == inode
    truncate(path / "adapter.safetensors")
    save(tmp_path, 3)
    assert_whole(tmp_path, 3)
