"""Files are whole or absent, and the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_tools.files import write_atomic
from finetune import storage
from finetune.errors import CheckpointError, StorageError

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "narrow": torch.arange(5, dtype=torch.float16),
    "brain": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "numbers": torch.arange(3),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(0.5),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}
METADATA = {"z": "last", "a": "ä first", "m": '{"json": 1}'}


def test_a_base_is_hashed_once_and_again_after_it_changed(tmp_path, monkeypatch):
    """Training and the export after it load the same base; hashing gigabytes twice is a minute for nothing."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"one")
    read: list[Path] = []
    whole = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: read.append(path) or whole(path))
    assert storage.sha256_weights(path) == storage.sha256_weights(path) == whole(path) and len(read) == 1
    path.write_bytes(b"other")
    assert storage.sha256_weights(path) == whole(path) and len(read) == 2


def test_safetensors_round_trip(tmp_path):
    """What is read is what was written, by our reader and by the library's own."""
    path = tmp_path / "deep" / "file.safetensors"
    storage.write_safetensors(path, TENSORS, METADATA)
    tensors, metadata = storage.read_safetensors(path)
    assert metadata == METADATA
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(load_file(path)[name], tensor)


def test_safetensors_bytes_are_the_same_in_another_process_and_order(tmp_path):
    """Reproducible artifacts: safetensors itself shuffles its metadata from process to process."""
    path = tmp_path / "a.safetensors"
    storage.write_safetensors(path, TENSORS, METADATA)
    backwards = {name: TENSORS[name] for name in reversed(TENSORS)}
    storage.write_safetensors(tmp_path / "b.safetensors", backwards, dict(reversed(METADATA.items())))
    code = (
        "import sys; from pathlib import Path; from finetune import storage;"
        "storage.write_safetensors(Path(sys.argv[2]), *storage.read_safetensors(Path(sys.argv[1])))"
    )
    other = tmp_path / "c.safetensors"
    root = str(Path(storage.__file__).parent.parent)
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(path), str(other)], check=True, env=environment)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes() == other.read_bytes()


def test_header_is_canonical(tmp_path):
    """Sorted metadata, tensors in the order of their bytes, aligned to 8."""
    path = tmp_path / "a.safetensors"
    storage.write_safetensors(path, TENSORS, METADATA)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert length % 8 == 0
    assert list(header["__metadata__"]) == sorted(METADATA)
    assert offsets == sorted(offsets)
    assert offsets[-1][1] == len(data) - 8 - length


@settings(max_examples=25, deadline=None)
@given(
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=5), size=st.integers(0, 9)
)
def test_any_metadata_survives(tmp_path_factory, metadata, size):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    storage.write_safetensors(path, {"t": torch.ones(size)}, metadata)
    assert storage.read_safetensors(path)[1] == metadata


def test_mode_follows_the_umask(tmp_path):
    """A file that only its writer may read cannot be served or shared; safetensors 0.8.0 makes such files."""
    before = os.umask(0o022)
    try:
        storage.write_safetensors(tmp_path / "a.safetensors", TENSORS, {})
        os.umask(0o077)
        storage.write_json(tmp_path / "b.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    """The message names the file, the bytes needed and what to do; nothing half-written stays."""
    path = tmp_path / "a.safetensors"
    storage.write_safetensors(path, TENSORS, METADATA)
    old = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, call, full)
    with pytest.raises(StorageError) as caught:
        storage.write_safetensors(path, {"t": torch.ones(100)}, {})
    monkeypatch.undo()
    assert str(path) in caught.value.headline
    assert "bytes are needed" in caught.value.headline
    assert "No space left" in caught.value.text()
    assert "free some space" in caught.value.text()
    assert caught.value.exit_code == 5
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_drive_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    """A mounted cloud drive answers EINVAL for a folder; files are synced there as everywhere."""
    real, synced = os.fsync, []

    def no_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    storage.write_json(tmp_path / "a.json", {"whole": True})
    assert storage.read_json(tmp_path / "a.json") == {"whole": True}
    write_atomic(tmp_path / "b.csv", b"whole")
    assert (tmp_path / "b.csv").read_bytes() == b"whole"
    assert len(synced) == 2


def test_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    storage.write_safetensors(path, TENSORS, METADATA)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
        storage.read_safetensors(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        storage.read_safetensors(tmp_path / "none.safetensors")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        storage.read_json(tmp_path / "b.json")


def test_json_refuses_nan(tmp_path):
    """NaN is not JSON; other programs could not read the file."""
    with pytest.raises(ValueError, match="nan"):
        storage.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_atomic_dir_appears_whole(tmp_path):
    target = tmp_path / "model"
    with storage.atomic_dir(target) as folder:
        (folder / "a.txt").write_text("new")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_atomic_dir_replaces_and_keeps_the_old_one_on_failure(tmp_path):
    target = tmp_path / "model"
    with storage.atomic_dir(target) as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), storage.atomic_dir(target) as folder:
        (folder / "a.txt").write_text("half")
        raise RuntimeError
    assert (target / "a.txt").read_text() == "old"
    with storage.atomic_dir(target) as folder:
        (folder / "b.txt").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_atomic_dir_puts_the_old_one_back_if_the_rename_fails(tmp_path, monkeypatch):
    """Between the two renames there is no folder; a failure there must not lose the old one."""
    target = tmp_path / "model"
    with storage.atomic_dir(target) as folder:
        (folder / "a.txt").write_text("old")
    rename = os.rename

    def failing(source, destination):
        if ".part-" in str(source):
            raise OSError(errno.EIO, "I/O error")
        rename(source, destination)

    monkeypatch.setattr(storage.os, "rename", failing)
    with pytest.raises(StorageError), storage.atomic_dir(target) as folder:
        (folder / "a.txt").write_text("new")
    assert (target / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_errors_of_the_disk_become_storage_errors(tmp_path):
    """A library that looks for a file in vain has another problem than a full disk."""
    with pytest.raises(FileNotFoundError), storage.disk_errors(tmp_path):
        (tmp_path / "none").read_text()
    with pytest.raises(StorageError), storage.disk_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")


def test_sha256_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert storage.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_names_as_long_as_the_system_takes_are_written(tmp_path):
    """What is written beside a file first has a longer name than the file."""
    storage.write_json(tmp_path / ("x" * 250 + ".json"), {"a": 1})
    with pytest.raises(StorageError):
        storage.write_json(tmp_path / ("x" * 251 + ".json"), {"a": 1})
    assert len(list(tmp_path.iterdir())) == 1
