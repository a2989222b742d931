"""How the commands talk: plain lines, tables whose cells cannot steer the terminal, progress bars, problems."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_tools.errors import grouped, shown
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


def print_problems(console: Console, result: ScanResult) -> None:
    """Warnings and notes; errors follow as the command's error."""
    for severity, style in (("warning", "yellow"), ("note", "")):
        lines = grouped(result.of(severity))
        if lines:
            say(console, f"{severity}s:", style="bold")
        for line in lines:
            say(console, f"  - {line}", style=style)
