"""What the command line draws fits where it is drawn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from finetune.console import ConsoleReporter
from finetune.tracking import file_size

ROWS = [("Loss relative to the base", "0.8 on 2 held-out pictures"), ("kohya", "runs/x/a.safetensors [1.2MB] of it")]


@pytest.mark.parametrize("width", [30, 40, 80])
def test_tables_fit_the_terminal(width):
    """On a phone's terminal two columns leave no room for the words; every word is still there, unbroken."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    ConsoleReporter(console).table("Done", ROWS)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "runs/x/a.safetensors" in out.getvalue() and "[1.2MB]" in out.getvalue()


def test_a_log_keeps_paths_whole_unless_a_width_is_asked_for(monkeypatch):
    """CI logs have no terminal; who sets COLUMNS there wants that width."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert ConsoleReporter(Console(file=io.StringIO())).console.width == 160
    monkeypatch.setenv("COLUMNS", "80")
    assert ConsoleReporter(Console(file=io.StringIO())).console.width == 80


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (3_250_000, "3.2 MB"), (4e9, "4.0 GB")]
)
def test_sizes_are_told_in_a_unit_that_shows_them(count, told):
    """A card of two kilobytes is no "0.00 MB"."""
    assert file_size(int(count)) == told
