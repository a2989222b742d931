"""Commands that train: train, demo, build; and the end of every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune.cli.app import Overrides, Recipe, app
from finetune.config import Run
from finetune.console import ConsoleReporter
from finetune.run_files import load_run


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train an adapter; run it again and it goes on where it stopped.

    The run folder (output_dir) gets checkpoints, metrics.jsonl, sample sheets and the finished adapter. Ctrl-C saves
    first. For several GPUs: `accelerate launch -m finetune train RECIPE`.
    """
    train_and_export(load_run(recipe, overrides or ()))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything it makes.")] = Path("runs/demo"),
) -> None:
    """Teach the embedded base model a subject it has never seen: the whole job, on a CPU, in three minutes."""
    finetune.run_demo(output, ConsoleReporter())


@app.command()
def build(
    recipe: Recipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artifact; must not exist yet.")],
    overrides: Overrides = None,
    max_ratio: Annotated[
        float,
        typer.Option(help="Fail when the validation loss, divided by the base model's, is above this."),
    ] = 1.0,
) -> None:
    """Build an adapter as an artifact, for CI: check, train, score, export, verify, model card, hashes."""
    reporter = ConsoleReporter()
    artifact = finetune.build_artifact(load_run(recipe, overrides or ()), output, max_ratio, reporter)
    if artifact is None:
        return
    reporter.table(f"Artifact in {output}", artifact.rows())


def train_and_export(run: Run) -> None:
    """Train, export what was learned, and say what came of it."""
    reporter = ConsoleReporter()
    result = finetune.train(run, reporter)
    if not result.is_main_process:
        return
    rows = []
    if run.export.formats:
        exported = finetune.export_run(run.output_dir, run, run.output_dir / "exports", reporter)
        rows = finetune.exported_rows(exported)
    if result.validation:
        value, error = result.validation.value, result.validation.error
        rows.insert(0, ("Loss against the base", f"{value:.3f} +- {error:.3f} on {result.judged_on}"))
    reporter.table("Done", rows)
