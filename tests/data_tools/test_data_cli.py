"""The command line, run as users run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_tools.cli import main

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """run("scan", folder, ...): the command's own `main`, in this process (a fresh one takes a second)."""

    def call(*arguments: object) -> Result:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["data_tools", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code or 0
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return call


def flat(text: str) -> str:
    """Without table lines and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"[│┃━─]", " ", text))


def test_help_teaches_each_verb(run):
    """The first page must lead to the second command."""
    result = run("--help")
    assert result.returncode == 0 and all(verb in result.stdout for verb in ("scan", "caption", "bucket"))
    for verb, words in (
        ("scan", ("--template", "--write", "kohya", "Exit code", "auto =")),
        ("caption", ("--replace",)),
        ("bucket", ("--resolution", "--upscale", "--files")),
    ):
        page = run(verb, "--help")
        assert page.returncode == 0 and all(
            word in flat(page.stdout) for word in (*words, "finetune data")
        ), verb


def test_scan_shows_pictures_and_problems_and_writes_only_when_asked(run, tmp_path, save):
    """Looking must never change a folder."""
    save("a.png", 48, 32, 1, caption="a [bold]red[/bold] square")
    save("b.gif", 32, 32, 2, caption="b")
    (tmp_path / "notes.psd").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    result = run("scan", tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(
        words in flat(result.stdout)
        for words in (
            "a [bold]red[/bold] square",
            "48 x 32",
            "2 usable pictures",
            "2 from sidecar",
            "notes.psd: is left aside",
            "Add --write",
        )
    )
    assert sorted(tmp_path.iterdir()) == before
    result = run("scan", tmp_path, "--write")
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert result.returncode == 0 and [row["file_name"] for row in rows] == ["a.png", "b.gif"]


def test_scan_with_errors_exits_3_lists_all_and_writes_nothing(run, tmp_path, save):
    """CI and people must both see it: a code, every name, no traceback, no half manifest."""
    save("a.png", caption="a")
    save("naked.png", tint=2)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "ev\x1b[31mil.png").write_bytes(b"")
    result = run("scan", tmp_path, "--write")
    assert result.returncode == 3 and "Traceback" not in result.stderr
    assert all(
        words in result.stderr
        for words in ("empty.png", "is empty", "naked.png: has no caption", "--template")
    )
    assert "\x1b" not in result.stdout + result.stderr and "\\x1b[31mil.png" in result.stderr
    assert not (tmp_path / "metadata.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("scan", "nowhere"), "is not there"),
        (("scan", ".", "--captions", "magic"), "choose one of"),
        (("scan", ".", "--template", "a {x}"), "not known"),
        (("scan", ".", "--background", "blurple"), "no colour"),
        (("caption", "."), "choose one of"),
        (("bucket", ".", "--resolution", "32"), "resolution=32"),
        (("scan",), "FOLDER"),
        (("scan", ".", "--workers", "0"), "--workers"),
    ],
)
def test_wrong_options_exit_2_and_say_what_is_right(run, arguments, word):
    """Usage is told apart from data by its code."""
    result = run(*arguments)
    assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr


def test_scan_with_template_and_background(run, tmp_path):
    """The two options that change what is trained on."""
    from PIL import Image

    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    result = run("scan", tmp_path, "--template", "a photo of {stem}", "--background", "#102030")
    assert result.returncode == 0 and "a photo of a" in result.stdout and "on #102030" in flat(result.stdout)


def test_caption_writes_files_beside_pictures_and_keeps_those_there(run, tmp_path, save):
    """Hand-written captions are worth more than anything a tool says."""
    save("a.png", tint=1, caption="by hand")
    save("deep/red_car.png", tint=2)
    shown = run("caption", tmp_path, "--captions", "filename")
    assert (
        shown.returncode == 0 and "red car" in shown.stdout and not (tmp_path / "deep/red_car.txt").exists()
    )
    assert run("caption", tmp_path, "--captions", "filename", "--write").returncode == 0
    assert (tmp_path / "deep/red_car.txt").read_text() == "red car\n" and (
        tmp_path / "a.txt"
    ).read_text() == "by hand"
    assert run("caption", tmp_path, "--template", "x {stem}", "--write", "--replace").returncode == 0
    assert (tmp_path / "a.txt").read_text() == "x a\n"
    assert run("scan", tmp_path).returncode == 0


def test_caption_writes_nothing_when_a_name_describes_nothing(run, tmp_path, save):
    """Half a folder of captions is harder to mend than none."""
    save("good name.png", tint=1)
    save("IMG_0001.png", tint=2)
    result = run("caption", tmp_path, "--captions", "filename", "--write")
    assert result.returncode == 3 and "IMG_0001.png" in result.stderr and not list(tmp_path.glob("*.txt"))


def test_bucket_shows_the_plan_with_and_without_a_manifest(run, tmp_path, save):
    """What is cropped must be seen before it is trained on."""
    save("4_x/wide.png", 256, 100, 1, caption="w")
    save("small.png", 40, 40, 2, caption="s")
    for _ in range(2):
        result = run("bucket", tmp_path, "--resolution", 64, "--multiple", 8, "--files")
        text = flat(result.stdout)
        assert result.returncode == 0, result.stderr
        assert "40 x 40 (small) 1 1 0.0%" in text and "96 x 40 1 4" in text and "4_x/wide.png" in text
        assert run("scan", tmp_path, "--write").returncode == 0


def test_pictures_that_fit_no_bucket_do_not_hide_the_plan_of_the_others(run, tmp_path, save):
    """All faults at once: those too small for a bucket with those that cannot be read, and the table for the rest."""
    save("fine.png", 256, 256, 1, caption="w")
    save("tiny.png", 40, 40, 2, caption="s")
    save("empty.png", 40, 40, 3, caption="s").write_bytes(b"")
    result = run("bucket", tmp_path, "--resolution", 256)
    assert result.returncode == 3 and "256 x 256" in result.stdout
    assert "tiny.png: is 40 x 40 pixels, smaller than one step of the buckets" in flat(result.stderr)
    assert "empty.png: is empty" in flat(result.stderr)


def test_python_m_data_tools_is_the_command(tmp_path):
    """The way to run it without the toolkit, with the exit code that CI reads."""
    (tmp_path / "empty.png").write_bytes(b"")
    command = [sys.executable, "-m", "data_tools", "scan", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert (
        result.returncode == 3 and "empty.png: is empty" in result.stderr and "Traceback" not in result.stderr
    )


def test_starting_the_command_does_not_import_torch():
    """Help and scan answer at once; torch takes seconds."""
    code = "import sys, data_tools.cli; print('torch' in sys.modules, 'finetune' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.split() == ["False", "False"]
