"""How the commands talk: plain lines, tables whose cells cannot steer the terminal, progress bars, problems."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data_tools.errors import DATA, DataToolsError, gravest, grouped, shown
from data_tools.scan import Progress as OnProgress
from data_tools.scan import ScanResult


@contextmanager
def progress_bar(what: str) -> Iterator[OnProgress | None]:
    """A progress bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as plain text."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def table_of(title: str, *columns: str) -> Table:
    """An empty table with these columns."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Cells as plain text: file names and captions must neither style nor steer the terminal."""
    table.add_row(*(Text(shown(cell)) for cell in cells))


def print_json(result: ScanResult, **more: object) -> None:
    """The whole result as one JSON object on standard output; `exit_code` is the command's."""
    document = {
        "folder": str(result.folder),
        **more,
        "decoded": result.decoded,
        "records": [asdict(record) for record in result.records],
        "problems": [asdict(problem) for problem in result.problems],
    }
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=True) + "\n")


def conclude(result: ScanResult, strict: bool) -> None:
    """Stop when there are errors or, with `strict`, warnings.

    Raises:
        DataToolsError: naming them; its exit code is that of the gravest.
    """
    result.raise_for_errors()
    warnings = result.of("warning")
    if strict and warnings:
        raise DataToolsError(
            f"{shown(str(result.folder))}: {len(warnings)} warnings, and --strict takes them for errors:",
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


@contextmanager
def counting_bar(what: str) -> Iterator[Callable[[int], None] | None]:
    """A running count on a terminal, for work whose end is not known; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), SpinnerColumn(), TextColumn("{task.completed} files"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done: bar.update(task, completed=done)
