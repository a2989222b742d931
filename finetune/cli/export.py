"""Command that writes adapters for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune.cli.app import app
from finetune.console import ConsoleReporter
from finetune.run_files import change_run, load_run


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A run folder with a finished adapter.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="diffusers, kohya, peft or merged; repeatable. Default: the run's own."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to; default: exports in the run folder.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; default: the run's own.")] = "",
    force: Annotated[bool, typer.Option(help="Keep a merged model that rounding takes much from.")] = False,
) -> None:
    """Write the adapter in the layouts other programs load; each file is read back and compared before it counts."""
    reporter = ConsoleReporter()
    run = load_run(run_folder)
    changes = [f"export.formats=[{', '.join(formats)}]"] if formats else []
    run = change_run(run, [*changes, *([f"export.dtype={dtype}"] if dtype else [])])
    exported = finetune.export_run(run_folder, run, output or run_folder / "exports", reporter, force=force)
    reporter.table("Exported and read back", finetune.exported_rows(exported))
