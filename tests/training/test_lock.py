"""One run per folder: a lock that outlives no one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from finetune.errors import BusyError, StorageError
from finetune.training import lock
from finetune.training.lock import check_free, hold


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """Two runs in one folder mix their checkpoints; the message says whom to look for."""
    with hold(tmp_path / "run"), pytest.raises(BusyError) as caught, hold(tmp_path / "run"):
        pass
    assert f"process {os.getpid()} on {os.uname().nodename}" in str(caught.value)
    assert caught.value.exit_code == 7
    with hold(tmp_path / "run"):
        pass


def test_a_killed_run_gives_the_folder_back_at_once(tmp_path: Path) -> None:
    """No stale lock to delete by hand, even while a worker that the run forked is still alive."""
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        with hold(tmp_path):
            worker = os.fork()
            if worker:
                os.write(write, worker.to_bytes(8, "little"))
            time.sleep(60)
        os._exit(0)
    worker = int.from_bytes(os.read(read, 8), "little")
    try:
        with pytest.raises(BusyError, match=f"process {run} on"), hold(tmp_path):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        os.kill(worker, 0)  # still alive
        with hold(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_twenty_starts_give_one_holder(tmp_path: Path) -> None:
    """However many start at the same moment, exactly one runs."""
    read, write = os.pipe()
    children = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.close(write)
                with hold(tmp_path):
                    os.read(read, 1)  # until the parent closes its end
                    code = 0
            except BusyError:
                code = BusyError.exit_code
            finally:
                os._exit(code)
        children.append(pid)
    codes: list[int] = []
    while children:
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        if len(children) == 1 and write >= 0:
            os.close(write)
            write = -1
        time.sleep(0.01)
    os.close(read)
    assert codes == [7] * 19 + [0]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    """Said at the start, with what to do, not after the model is loaded."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="choose another output_dir"), hold(tmp_path / "file" / "run"):
        pass


def test_a_folder_that_the_system_never_makes_is_told_as_such() -> None:
    """Linux says "no such file" to who makes a folder in /proc, as it does when a folder vanishes in between."""
    with pytest.raises(StorageError, match="cannot be made"), hold(Path("/proc/nobody/run")):
        pass


def test_a_refused_run_leaves_no_folder_behind(tmp_path: Path) -> None:
    """Folders that were made for the lock go with it; one with anything in it stays, and so does one that was there."""
    with pytest.raises(KeyError), hold(tmp_path / "runs" / "new"):
        raise KeyError
    assert not (tmp_path / "runs").exists()
    with hold(tmp_path / "kept"):
        (tmp_path / "kept" / "run.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyError), hold(tmp_path / "empty"):
        raise KeyError
    assert (tmp_path / "kept" / ".lock").exists() and (tmp_path / "empty" / ".lock").exists()


def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_the_folder(tmp_path: Path, monkeypatch) -> None:
    """Who opened the file of a refused run would hold a file that is nowhere, beside the next holder of the folder."""
    real = lock._lock
    removed = []

    def removing(descriptor: int, folder: Path) -> None:
        if not removed:
            removed.append((folder / ".lock").unlink())
        real(descriptor, folder)

    monkeypatch.setattr(lock, "_lock", removing)
    with hold(tmp_path), pytest.raises(BusyError), hold(tmp_path):
        pass
    assert len(removed) == 1


def test_whether_a_folder_is_free_can_be_asked_without_touching_it(tmp_path: Path) -> None:
    """The command line asks before it imports anything slow."""
    check_free(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with hold(tmp_path / "run"), pytest.raises(BusyError):
        check_free(tmp_path / "run")
