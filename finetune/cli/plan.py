"""Command that says what a run will do, take and leave."""

from __future__ import annotations

from typing import Annotated

import typer

import finetune
from finetune.cli.app import Overrides, Recipe, app
from finetune.console import ConsoleReporter
from finetune.run_files import load_run


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    measure: Annotated[
        int, typer.Option(min=0, help="Time so many real steps as well; encoded pictures stay in the cache.")
    ] = 0,
) -> None:
    """Check a run and predict it: steps, epochs, trained parameters, memory, disk, and with --measure time.

    Memory is counted without an accelerator, to a few percent of what a step takes.
    """
    finetune.plan_run(load_run(recipe, overrides or ()), ConsoleReporter(), measure)
