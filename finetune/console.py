"""What the command line draws: tables, notes and progress bars with the time left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finetune.tracking import Advance, Reporter, Rows

PLAIN_SECONDS = 10.0
"""Without a terminal (CI, a log file) a progress line appears at most this often, in seconds."""


PLAIN_WIDTH = 160
"""Characters per line where there is no terminal and COLUMNS names no other, so that paths stay whole."""
NARROW = 60
"""Characters per line below which a table's labels get lines of their own."""


class ConsoleReporter(Reporter):
    """Draws on a terminal; prints plain lines where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`, or on standard output."""
        self.console = console or Console(highlight=False, emoji=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PLAIN_WIDTH

    def note(self, text: str) -> None:
        """See `Reporter.note`."""
        self.console.print(f"  {text}", markup=False, style="dim")

    def warn(self, text: str) -> None:
        """See `Reporter.warn`."""
        self.console.print(f"! {text}", markup=False, style="yellow")

    def table(self, title: str, rows: Rows) -> None:
        """See `Reporter.table`."""
        if self.console.width < NARROW:
            self.console.print(title, style="bold", markup=False)
            for label, value in rows:
                self.console.print(f" {label}", style="cyan", markup=False)
                self.console.print(Padding(Text(value, overflow="fold"), (0, 0, 0, 3)))
            return
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(label, value)
        self.console.print(table)

    @contextlib.contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """See `Reporter.progress`."""
        drawn = self._bar(title, total, done) if self.console.is_terminal else self._lines(title, total, done)
        with drawn as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, title: str, total: int, done: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<28}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, speed_estimate_period=60) as bar:
            task = bar.add_task(title, total=total, completed=done, detail="")

            def advance(finished: int, detail: str) -> None:
                bar.update(task, completed=finished, detail=detail)

            yield advance

    @contextlib.contextmanager
    def _lines(self, title: str, total: int, done: int) -> Iterator[Advance]:
        started = last = time.monotonic()

        def advance(finished: int, detail: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PLAIN_SECONDS and finished < total:
                left = (now - started) / max(1, finished - done) * (total - finished)
                self.console.print(f"{title}: {finished}/{total}, {left:.0f} s left  {detail}", markup=False)
                last = now

        yield advance
        self.console.print(f"{title}: done in {time.monotonic() - started:.1f} s", markup=False)
