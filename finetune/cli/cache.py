"""Command that looks after encoded pictures and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from data_tools.errors import counted
from finetune.cli.app import app
from finetune.console import ConsoleReporter
from finetune.errors import ConfigError, DataError


@app.command()
def cache(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a cache that runs share (data.cache_folder).")],
    check: Annotated[
        bool, typer.Option("--check", help="Compare every entry with its checksum; exit code 3 if one is damaged.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Delete damaged and half-written files, and files selected by --unused."),
    ] = False,
    unused: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Also list files that no run has used for DAYS.")
    ] = None,
) -> None:  # fmt: skip
    """Inspect a cache of encoded pictures, masks and captions; nothing is deleted without --prune.

    Training encodes pictures and captions once and keeps the results here, for all steps and for later runs.

    Examples:

      finetune cache runs/mine --check

      finetune cache shared-cache --unused 30 --prune
    """
    if prune and check:
        raise ConfigError("--check and --prune cannot be combined; --prune checks as well.")
    reporter = ConsoleReporter()
    found = finetune.inspect_cache(folder, reporter, read=check or prune, unused_days=unused)
    damaged = found.damaged
    if prune:
        found = finetune.prune_cache(found)
    reporter.table(f"Cache in {found.folder}", found.rows())
    if check and damaged:
        raise DataError(
            f"{counted(len(damaged), 'file is', 'files are')} damaged; training ignores them and encodes anew.",
            [*(str(path) for path in damaged[:20]), f"`finetune cache {folder} --prune` deletes them"],
        )
