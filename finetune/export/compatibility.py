"""Which of a format's readers can use a family's file at all; the others are named with the reason, not tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.export.interchange import architecture
from finetune.export.job import Job
from finetune.interchange.compatibility import NO, judge, shortcomings
from finetune.interchange.sources import open_sources

FIXED_WIDTHS = {"kohya": "diffusers", "single-file": "from_single_file"}
"""Format -> reader of which diffusers' converters for transformers know the published sizes only."""
INSTEAD = {"single-file": "original"}
"""Format -> reader that knows every size."""


def readers_of(job: Job, path: Path, format_name: str, readers: Sequence[str]) -> tuple[list[str], list[str]]:
    """(readers to try, notes about the others)."""
    table = architecture(job)
    chosen, notes = list(readers), []
    if format_name == "kohya":
        sources = open_sources(path, table)
        notes += shortcomings(table, sources)
        if judge("diffusers", table, sources).verdict == NO:
            chosen.remove("diffusers")
    fixed = FIXED_WIDTHS.get(format_name)
    if fixed in chosen and job.family.packing > 1 and not table.published:
        chosen.remove(fixed)
        chosen += [INSTEAD[format_name]] if format_name in INSTEAD else []
        notes.append(f"{fixed} supports only the published size of this family and was not tried.")
    return chosen, notes
