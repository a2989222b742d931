"""What a scan remembers: unchanged pictures are not decoded again, changed ones always are, processes share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.errors import StorageError, UsageError
from data_tools.folder import list_folder
from data_tools.inspection import Looking, inspect_share
from data_tools.memory import SETTLED_NS, Memory
from data_tools.processes import Share, this_process
from data_tools.scan import ScanResult, scan

ROOT = Path(__file__).parents[2]
WHITE = (255, 255, 255)


@pytest.fixture
def known(tmp_path, save, monkeypatch):
    """known(): scan the folder with a memory; files count as settled at once."""
    monkeypatch.setattr("data_tools.memory.SETTLED_NS", -1)
    for number in range(4):
        save(f"data/{number}.png", tint=number, caption=f"picture {number}")
    (tmp_path / "data" / "broken.png").write_bytes(b"<html>")
    (tmp_path / "data" / "broken.txt").write_text("x")

    def run(**options) -> ScanResult:
        return scan(tmp_path / "data", memory=Memory(tmp_path / "data", WHITE, folder=tmp_path / "m", **options))

    return run


def test_a_second_scan_decodes_nothing_and_says_the_same(known):
    """Idempotent and quick: the answer must not depend on what was remembered, broken pictures included."""
    first, second = known(), known()
    assert (first.decoded, second.decoded) == (5, 0)
    assert first.records == second.records and first.problems == second.problems
    assert known(fresh=True).decoded == 5


def test_a_changed_picture_is_decoded_though_its_time_was_kept(known, tmp_path, save):
    """rsync -t, unzip and git keep times; trusting them alone shows the old picture."""
    before = known().records[0]
    status = (tmp_path / "data/0.png").stat()
    save("data/0.png", 32, 48, tint=9)
    os.utime(tmp_path / "data/0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    result = known()
    assert result.decoded == 1 and result.records[0].sha256 != before.sha256 and result.records[0].width == 32


def test_a_caption_edited_under_the_same_time_is_seen(known, tmp_path):
    """Captions are read each time; only decoding is remembered."""
    known()
    path = tmp_path / "data/1.txt"
    status = path.stat()
    path.write_text("another 1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = known()
    assert result.decoded == 0 and result.records[1].captions == ("another 1",)


def test_a_touched_or_renamed_picture_is_read_but_not_decoded(known, tmp_path, monkeypatch):
    """The same bytes are the same picture, wherever they lie and whatever the clock says."""
    known()
    os.utime(tmp_path / "data/2.png")
    os.rename(tmp_path / "data/3.png", tmp_path / "data/four.png")
    os.rename(tmp_path / "data/3.txt", tmp_path / "data/four.txt")
    monkeypatch.setattr("data_tools.inspection.decode", lambda *_: pytest.fail("was decoded"))
    assert [record.file_name for record in known().records] == ["0.png", "1.png", "2.png", "four.png"]


def test_a_picture_written_just_now_is_read_again(tmp_path, save):
    """Within the grain of a file system's clock a second write leaves no trace in the times."""
    assert SETTLED_NS > 1_000_000_000
    save("data/a.png", caption="a")
    for _ in range(2):
        memory = Memory(tmp_path / "data", WHITE, folder=tmp_path / "m")
        assert memory.recall("a.png", os.stat(tmp_path / "data/a.png")) is None
        scan(tmp_path / "data", memory=memory)


def test_another_background_is_another_memory(known, tmp_path):
    """The pixels behind transparency are part of the picture."""
    known()
    assert scan(tmp_path / "data", background=(0, 0, 0),
                memory=Memory(tmp_path / "data", (0, 0, 0), folder=tmp_path / "m")).decoded == 5  # fmt: skip


@pytest.mark.parametrize("damage", [b"", b"\x00\xff{]\n", b'["0.png"]\n', b'["0.png",[1],true,"d",[1]]\n', b'["0.pn'])
def test_a_damaged_memory_is_no_more_than_a_slow_scan(known, tmp_path, damage):
    """Disks fill up and processes die in the middle of a line; a cache may never be a reason to fail."""
    first = known()
    (log,) = (tmp_path / "m").rglob("*.jsonl")
    log.write_bytes(damage + b"".join(log.read_bytes().splitlines(keepends=True)[:2])[:-20])
    again = known()
    assert again.records == first.records and again.decoded >= 3
    assert known().decoded == 0


def test_the_memory_does_not_grow_for_ever(known, tmp_path):
    """A folder that is edited daily for a year must not leave a year of lines."""
    known()
    (log,) = (tmp_path / "m").rglob("*.jsonl")
    line = log.read_bytes().splitlines(keepends=True)[0]
    log.write_bytes(log.read_bytes() + line * 100)
    known()
    assert len(log.read_bytes().split(b"\n[")) == 5 and known().decoded == 0


def test_a_killed_scan_goes_on_where_it_was(tmp_path, save):
    """A hundred thousand pictures take hours; a kill may cost seconds."""
    for number in range(40):
        save(f"data/{number:02d}.png", 300, 300, tint=number, caption="x")
    code = (
        "import pathlib, sys, time\nfrom data_tools import inspection\nfrom data_tools.memory import Memory\n"
        "from data_tools.scan import scan\nwhole = inspection.phash\n"
        "def slow(image):\n    time.sleep(0.05)\n    return whole(image)\n"
        "inspection.phash = slow\nroot = pathlib.Path(sys.argv[1])\n"
        "scan(root, workers=1, memory=Memory(root, (255, 255, 255), folder=pathlib.Path(sys.argv[2])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "data", tmp_path / "m"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while _lines(tmp_path / "m") < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = _lines(tmp_path / "m")
    assert 5 <= done < 40, "killed in the middle"
    memory = Memory(tmp_path / "data", WHITE, folder=tmp_path / "m")
    assert len(memory.entries) >= done and len(scan(tmp_path / "data", memory=memory).records) == 40


def _lines(folder: Path) -> int:
    return sum(len(path.read_bytes().split()) for path in folder.rglob("*.jsonl"))


def test_each_process_takes_its_share_and_rank_0_joins_them(known, tmp_path):
    """`accelerate launch` on four processes: each decodes a part, the result is that of one."""
    alone = known()
    folder = tmp_path / "data"
    listing, decoded = list_folder(folder), 0
    for rank in (1, 2):
        memory = Memory(folder, WHITE, folder=tmp_path / "shared", share=Share(rank, 3))
        decoded += inspect_share(listing, Looking(WHITE, memory=memory)).decoded
    joined = scan(folder, memory=Memory(folder, WHITE, folder=tmp_path / "shared", share=Share(0, 3)))
    assert joined.records == alone.records and joined.problems == alone.problems
    assert joined.decoded + decoded == 5 and decoded > 0
    assert len(list((tmp_path / "shared").rglob("*.jsonl"))) == 3


def test_rank_0_does_the_work_of_processes_that_died(known, tmp_path, monkeypatch):
    """Nothing waits without a bound: after a while without news the rest is decoded here."""
    monkeypatch.setattr("data_tools.processes.PATIENCE", 0.3)
    memory = Memory(tmp_path / "data", WHITE, folder=tmp_path / "shared", share=Share(0, 2))
    assert scan(tmp_path / "data", memory=memory).records == known().records


def test_two_processes_of_a_launcher_make_one_manifest(tmp_path, save):
    """The command as torchrun and accelerate start it: RANK and WORLD_SIZE say who is who; only rank 0 speaks."""
    for number in range(6):
        save(f"data/{number}.png", tint=number, caption="x")
    command = [sys.executable, "-m", "data_tools", "scan", str(tmp_path / "data"), "--write"]
    environment = os.environ | {"FINETUNE_CACHE": str(tmp_path / "m"), "WORLD_SIZE": "2"}
    helper, leader = (
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in "10"
    )
    said, helped = leader.communicate(timeout=100)[0], helper.communicate(timeout=100)[0]
    assert (leader.returncode, helper.returncode, helped) == (0, 0, "") and "Wrote" in said
    assert len((tmp_path / "data/metadata.jsonl").read_text().splitlines()) == 6
    files = sorted((tmp_path / "m").rglob("*.jsonl"))
    names = [{json.loads(line)[0] for line in path.read_text().splitlines() if line} for path in files]
    assert len(names) == 2 and 0 < len(names[1]) < 6 == len(names[0] | names[1])


@pytest.mark.parametrize("rank, count", [("2", "2"), ("-1", "2"), ("x", "1"), ("0", "")])
def test_a_rank_outside_of_its_group_is_refused(rank, count):
    """A share that nobody else leaves out would be scanned twice, or never."""
    with pytest.raises(UsageError, match="accelerate launch"):
        this_process({"RANK": rank, "WORLD_SIZE": count})


def test_a_place_that_cannot_be_written_is_told_and_does_without(tmp_path, save, monkeypatch, capsys):
    """A read-only home must not stop anybody from looking at pictures; several processes cannot do without."""
    save("data/a.png", caption="a")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        Memory(tmp_path / "data", WHITE, folder=tmp_path / "file")
    assert caught.value.exit_code == 5
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["data_tools", "scan", str(tmp_path / "data")])
    for size, code in (("1", 0), ("2", 5)):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(SystemExit) as stop:
            main()
        assert (stop.value.code or 0) == code
    assert "Nothing is remembered" in capsys.readouterr().err
