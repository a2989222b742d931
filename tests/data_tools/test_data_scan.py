"""Scanning: every file of a folder is a record, was read for one, or is named with a reason and a remedy."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest

from data_tools.errors import SEVERITIES, DataToolsError, UsageError, shown
from data_tools.scan import inspect, scan


def about(result, name: str, severity: str | None = None) -> str:
    """All that the scan says about one file."""
    found = [p for p in result.problems if p.file_name == name and severity in (None, p.severity)]
    return "\n".join(str(problem) for problem in found)


def names(result) -> list[str]:
    return [record.file_name for record in result.records]


def test_a_clean_folder_gives_complete_records(tmp_path, save):
    """The record is all that later stages know of a picture."""
    save("a.png", 48, 32, caption="a red square")
    record = scan(tmp_path).records[0]
    assert (record.file_name, record.width, record.height) == ("a.png", 48, 32)
    assert record.captions == ("a red square",) and record.source == "sidecar"
    assert (record.role, record.repeats, record.mask_file, record.notes) == ("instance", 1, None, ())
    assert [len(digest) for digest in (record.sha256, record.pixel_sha256, record.phash)] == [64, 64, 16]
    assert scan(tmp_path).problems == []


def nasty_folder(tmp_path, save, draw):
    """One file for each trap; returns the names that must come out as records."""
    save("good.png", 64, 48, 1, caption="good")
    save("sub dir/ünï 😀 'q'.jpg", 48, 64, 2, caption="deep")
    save("lying.png", 40, 40, 3, caption="a webp", format="WEBP")
    save("UPPER.PNG", 40, 44, 4, caption="upper")
    for name, data in [
        ("empty.png", b""),
        ("page.png", b"<html>not found</html>"),
        ("notes.psd", b"x"),
        (".DS_Store", b"x"),
        ("tiny.gif", None),
        ("half.jpg", None),
        ("orphan.txt", b"who?"),
    ]:
        (tmp_path / name).write_bytes(data or b"")
    draw(4, 4).save(tmp_path / "tiny.gif")
    whole = save("whole.jpg", 200, 200, 5).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    save("naked.png", tint=6)
    (tmp_path / ".hidden").mkdir()
    save(".hidden/secret.png", tint=7)
    return ["UPPER.PNG", "good.png", "lying.png", "sub dir/ünï 😀 'q'.jpg"]


def test_nothing_is_dropped_in_silence(tmp_path, save, draw):
    """The rule of the house, on one folder with every kind of file."""
    usable = nasty_folder(tmp_path, save, draw)
    result = scan(tmp_path)
    assert names(result) == usable
    told = {problem.file_name for problem in result.problems}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    sidecars = {name.rsplit(".", 1)[0] + ".txt" for name in usable}
    assert files - set(usable) - sidecars - told == {".hidden/secret.png"} and ".hidden" in told
    assert all(problem.what and problem.why and problem.remedy for problem in result.problems)
    for name, severity, word in [
        ("empty.png", "error", "empty"),
        ("page.png", "error", "<html>"),
        ("tiny.gif", "error", "4 x 4"),
        ("half.jpg", "error", "truncated"),
        ("naked.png", "error", "--template"),
        ("orphan.txt", "warning", "without a picture"),
        ("notes.psd", "note", ".psd"),
        (".DS_Store", "note", "hidden"),
    ]:
        assert word in about(result, name, severity), name


def test_all_errors_are_raised_at_once(tmp_path, save, draw):
    """One run must show everything that is to be mended."""
    nasty_folder(tmp_path, save, draw)
    with pytest.raises(DataToolsError, match="5 errors, 4 usable") as caught:
        scan(tmp_path).raise_for_errors()
    assert caught.value.exit_code == 3
    assert all(
        name in str(caught.value) for name in ("empty.png", "page.png", "tiny.gif", "half.jpg", "naked.png")
    )


def test_order_and_content_do_not_depend_on_workers(tmp_path, save):
    """Two machines must make the same manifest of the same folder."""
    for number in range(12):
        save(f"{number % 3}/p{number}.png", 30 + number, 30, number, caption=str(number))
    one, four = scan(tmp_path, workers=1), scan(tmp_path, workers=4)
    assert one == four and names(one) == sorted(names(one))
    assert one.problems == sorted(one.problems, key=lambda p: SEVERITIES.index(p.severity))


def test_progress_counts_every_picture(tmp_path, save):
    """A bar that jumps or stops short makes people kill healthy runs."""
    for number in range(5):
        save(f"{number}.png", tint=number, caption="x")
    seen: list[tuple[int, int]] = []
    scan(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 5) for number in range(1, 6)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_named_like_a_picture_is_listed_not_opened(tmp_path, save):
    """Peers hang here for ever."""
    save("a.png", caption="x")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.caption")
    code = (
        "import sys, pathlib; from data_tools.scan import scan\n"
        "for problem in scan(pathlib.Path(sys.argv[1])).problems: print(problem)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert "pipe.png: is a named pipe" in result.stdout and "a.caption: is a named pipe" in result.stdout


def test_links_out_of_the_folder_are_refused(tmp_path, save):
    """A dataset from a stranger must not pull other files of this machine into training."""
    outside = save("outside/secret.png", caption="secret").parent
    save("data/a.png", tint=1, caption="a")
    folder = tmp_path / "data"
    (folder / "leak.png").symlink_to(outside / "secret.png")
    (folder / "a.caption").symlink_to(outside / "secret.txt")
    (folder / "dir").symlink_to(outside)
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "inner.png").symlink_to("a.png")
    (folder / "inner.txt").write_text("b")
    (folder / "loop").symlink_to(folder)
    result = scan(folder)
    assert names(result) == ["a.png", "inner.png"]
    for name in ("leak.png", "a.caption", "dir"):
        assert "leads out of the folder" in about(result, name, "error"), name
    assert "broken link" in about(result, "gone.png", "error")
    assert "link to a folder" in about(result, "loop", "warning")
    assert "a.png, under another caption" in about(result, "inner.png", "warning")


def test_exact_duplicates_are_found_across_formats(tmp_path, save):
    """A copy counts twice, and hides overfitting when it sits in the validation set."""
    save("a.png", caption="x")
    save("b.bmp", caption="x")
    save("c.png", tint=9, caption="x")
    result = scan(tmp_path)
    assert len(result.records) == 3
    assert "exactly the pixels of a.png;" in about(result, "b.bmp", "warning") and not about(result, "c.png")


def test_names_that_clash_on_other_systems_are_warned_about(tmp_path, save):
    """Unpacked on macOS or Windows, one of the two pictures is gone."""
    save("Cat.png", tint=1, caption="x")
    save("cat.png", tint=2, caption="y")
    assert "upper and lower case" in about(scan(tmp_path), "cat.png", "warning")


def test_hostile_names_work_and_are_escaped_when_shown(tmp_path, save):
    """A file name may hold terminal commands and text direction marks; they must reach the screen as text."""
    evil = "a\x1b]0;owned\x07\n\u202egnp.png"
    save(evil, tint=1)
    save("n" * 250 + ".png", tint=2, caption="long")
    result = scan(tmp_path)
    assert names(result) == ["n" * 250 + ".png"]
    line = about(result, evil, "error")
    assert "\\x1b" in line and "\\u202e" in line and not set(line) & {"\x1b", "\x07", "\n", "\u202e"}
    assert shown("père 😀 👨‍👩‍👧") == "père 😀 👨‍👩‍👧"


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path, save):
    """JSON cannot hold it, so no manifest could name it."""
    save("a.png", caption="x")
    try:
        shutil.copy(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff.png")
    except OSError as error:
        assert error.errno == errno.EILSEQ, "only a file system that takes UTF-8 alone may refuse the name itself"
        return
    result = scan(tmp_path)
    assert names(result) == ["a.png"] and any(
        "not UTF-8" in str(p) and "\\udcff" in str(p) for p in result.problems
    )


@pytest.mark.parametrize(
    "name, told",
    [
        ("test_01.png", True),
        ("10_test dog/a.png", True),
        ("contest.png", False),
        ("a train.png", True),
        ("latest_dev_b.png", True),
        ("values.png", False),
    ],
)
def test_names_that_other_loaders_take_for_splits_are_told(tmp_path, save, name, told):
    """`datasets` loads only test_01.png of such a folder, and without its caption."""
    save(name, caption="x")
    assert ("would take it for a split" in about(scan(tmp_path), name, "note")) == told


def test_extreme_shapes_are_warned_about(tmp_path, save):
    """A panorama loses most of itself in any bucket."""
    save("pano.png", 400, 20, caption="x")
    assert "20.0 to 1" in about(scan(tmp_path), "pano.png", "warning")


def test_exif_rotation_counts_for_the_size(tmp_path, draw):
    """Size before rotation puts the picture into the wrong bucket, as peers do."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    draw(64, 32).save(tmp_path / "a.jpg", exif=exif)
    record = inspect(tmp_path).records[0]
    assert (record.width, record.height, record.notes) == (32, 64, ("EXIF rotated 90",))


def test_folders_that_cannot_be_scanned_say_so(tmp_path, save):
    """The most common first mistake is the wrong path."""
    with pytest.raises(UsageError, match="is not there"):
        scan(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is a file"):
        scan(save("a.png"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.psd").write_bytes(b"x")
    with pytest.raises(DataToolsError, match=r"no picture") as caught:
        scan(tmp_path / "b")
    assert "x.psd" in str(caught.value)


def test_composed_and_decomposed_names_sort_alike(tmp_path, save):
    """macOS stores names decomposed; the order of a dataset must not change with the machine."""
    save(unicodedata.normalize("NFD", "é1.png"), tint=1, caption="x")
    save(unicodedata.normalize("NFC", "é2.png"), tint=2, caption="y")
    save("f.png", tint=3, caption="z")
    save("e.png", tint=4, caption="z")
    assert [unicodedata.normalize("NFC", name) for name in names(scan(tmp_path))] == [
        "e.png",
        "f.png",
        "é1.png",
        "é2.png",
    ]
