"""How the commands talk: plain lines, tables whose cells cannot steer the terminal, progress, problems."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_tools.clean import Stage
from data_tools.errors import DATA, DataToolsError, counted, gravest, grouped, shown
from data_tools.inspection import Progress as OnProgress
from data_tools.processes import ALONE, Share
from data_tools.scan import ScanResult

PLAIN_SECONDS = 10.0
"""Without a terminal a progress line appears at most this often."""


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as plain text."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    most: int | None = None,
    more: str = "",
    count: int | None = None,
) -> None:
    """The first `most` rows, and how many more of `count` (all, if None) there are; nothing where there is none.

    Cells are plain text: file names and captions must neither style nor steer the terminal.
    """
    if not rows:
        return
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows[:most]:
        table.add_row(*(Text(shown(cell)) for cell in row))
    console.print(table)
    count = len(rows) if count is None else count
    if most is not None and count > most:
        say(console, f"... and {count - most:,} more{more}.")


@contextmanager
def stages(share: Share = ALONE) -> Iterator[Stage]:
    """One progress bar per stage on a terminal; elsewhere a line with the time left now and then; rank 0 shows it.

    A stage is told (done, total); a total of 0 means that the end is not known. Ctrl-C is answered in words.
    """
    console = Console(stderr=True)
    try:
        with _stages(console, share) as stage:
            yield stage
    except KeyboardInterrupt:
        say(console, "Stopped. What was done is whole, and the same command goes on.", style="yellow")
        raise


@contextmanager
def _stages(console: Console, share: Share) -> Iterator[Stage]:
    if share.rank:
        yield lambda title: None
        return
    if not console.is_terminal:
        yield lambda title: _Lines(console, title)
        return
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        def stage(title: str) -> OnProgress:
            task = bar.add_task(title, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total or None)

        yield stage


class _Lines:
    """A progress line every few seconds, for log files."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.started = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= PLAIN_SECONDS and done and done != total:
            left = f"/{total}, {(now - self.started) / done * (total - done):.0f} s left" if total else ""
            self.console.print(f"{self.title}: {done}{left}", markup=False, highlight=False)
            self.last = now


def print_json(result: ScanResult, **more: object) -> None:
    """The whole result as one JSON object on standard output; `exit_code` is the command's."""
    document = {
        "folder": str(result.folder),
        **more,
        "decoded": result.decoded,
        "records": [asdict(record) for record in result.records],
        "problems": [asdict(problem) for problem in result.problems],
    }
    typer.echo(json.dumps(document, indent=1, ensure_ascii=True))


def conclude(result: ScanResult, strict: bool) -> None:
    """Stop when there are errors or, with `strict`, warnings.

    Raises:
        DataToolsError: naming them; its exit code is that of the gravest.
    """
    result.raise_for_errors()
    warnings = result.of("warning")
    if strict and warnings:
        raise DataToolsError(
            f"{shown(str(result.folder))}: {counted(len(warnings), 'warning')}, and --strict takes them for errors:",
            grouped(warnings),
        )


def exit_code(result: ScanResult, strict: bool) -> int:
    """What `conclude` will exit with."""
    return gravest(result.problems) or (DATA if strict and result.of("warning") else 0)


def print_problems(console: Console, result: ScanResult) -> None:
    """Warnings and notes; errors follow as the command's error."""
    for severity, style in (("warning", "yellow"), ("note", "")):
        lines = grouped(result.of(severity))
        if lines:
            say(console, f"{severity}s:", style="bold")
        for line in lines:
            say(console, f"  - {line}", style=style)
