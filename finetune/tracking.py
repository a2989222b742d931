"""What a run tells: to the person watching (Reporter), and to files (MetricsLog)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.storage import write_text

Advance = Callable[[int, str], None]
"""Called with how much of the task is done, and a few words that change as it goes."""
Rows = Sequence[tuple[str, str]]
"""Label and value."""


def file_size(count: int) -> str:
    """Bytes of a file as file managers show them: 1 kB is 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


class Reporter:
    """Says nothing. The command line passes one that draws; libraries and tests pass this one."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something the user may want to change."""

    def table(self, title: str, rows: Rows) -> None:
        """Facts, such as the plan before the first step."""

    @contextlib.contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A task of `total` parts of which `done` are finished; yields the function that moves it on."""
        yield _nothing


def _nothing(finished: int, detail: str) -> None:
    """Draw no bar."""


def count_only(advance: Advance) -> Callable[[int, int], None]:
    """For functions that report (done, total): the same without the total."""
    return lambda done, total: advance(done, "")


class MetricsLog:
    """One JSON object per line in metrics.jsonl: always there, whatever other trackers are used."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open for appending; lines after `resume_step` belong to lost steps and are dropped, so curves never fork."""
        self._path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resume_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values measured after `step` optimizer steps."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """The complete lines of a log; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]
