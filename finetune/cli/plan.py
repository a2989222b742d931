"""Command that says what a run will do, take and leave."""

from __future__ import annotations

from typing import Annotated

import typer

import finetune
from finetune import before
from finetune.cli.app import Overrides, Recipe, app
from finetune.console import ConsoleReporter
from finetune.run_files import load_run


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    measure: Annotated[
        int,
        typer.Option(
            min=0, metavar="STEPS", help="Time so many real steps as well; what they encode stays in the cache."
        ),
    ] = 0,
) -> None:
    """Check a run and predict it: steps, epochs, trained parameters, memory, disk, and with --measure time.

    Memory is counted without a GPU, to a few percent of what a step takes. Nothing is trained or saved.

    Examples:

      finetune plan my.yaml

      finetune plan my.yaml --set train.batch_size=4 --measure 5
    """
    run = load_run(recipe, overrides or ())
    before.planning(run)
    finetune.plan_run(run, ConsoleReporter(), measure)
