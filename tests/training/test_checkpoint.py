"""Checkpoints survive kills at any moment, full disks and damaged bytes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.errors import CheckpointError
from finetune.training.checkpoint import latest_checkpoint
from tests.checkpoints import (
    FILES,
    assert_whole,
    names,
    save,
)


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


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    """A whole checkpoint is never replaced, so no kill can lose it; a damaged one is."""
    path = save(tmp_path, 3)
    inode = (path / "adapter.safetensors").stat().st_ino
    save(tmp_path, 3)
    assert (path / "adapter.safetensors").stat().st_ino == inode
    truncate(path / "adapter.safetensors")
    save(tmp_path, 3)
    assert_whole(tmp_path, 3)
