"""Command that predicts what a run will do and need."""

from __future__ import annotations

from typing import Annotated

import typer

import finetune
from finetune import early_checks
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
            min=0,
            metavar="STEPS",
            help="Also time this many real steps. Missing class pictures are rendered and everything is encoded first, "
            "and kept; that can take minutes.",
        ),
    ] = 0,
) -> None:
    """Check a run and predict its steps, epochs, parameters, memory and disk use; with --measure, its time too.

    Memory is predicted without a GPU, to within a few percent of a real step. Nothing is trained, and without --measure
    nothing is saved.

    Examples:

      finetune plan my.yaml

      finetune plan my.yaml --set train.batch_size=4 --measure 5
    """
    run = load_run(recipe, overrides or ())
    early_checks.planning(run)
    finetune.plan_run(run, ConsoleReporter(), measure)
