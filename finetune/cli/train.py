"""Commands that train: train, demo, build; and the end of every recipe."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune.cli.app import Overrides, Recipe, app
from finetune.config import Run
from finetune.console import ConsoleReporter
from finetune.run_files import load_run


class ResumeMode(StrEnum):
    """What to do about a run that is in the folder already."""

    auto = "auto"
    must = "must"
    never = "never"


class Twin(StrEnum):
    """Families with a tiny twin; a test holds the names against the families' own table."""

    sd1 = "sd1"
    sd2 = "sd2"
    sdxl = "sdxl"
    sdxl_refiner = "sdxl_refiner"
    sd3 = "sd3"
    flux = "flux"


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        ResumeMode,
        typer.Option(help="auto: go on with a run that is there; must: refuse to start anew; never: to go on."),
    ] = ResumeMode.auto,
    accept_data_change: Annotated[
        bool, typer.Option("--accept-data-change", help="Go on although pictures or captions have changed.")
    ] = False,
    strict_numerics: Annotated[
        bool, typer.Option("--strict-numerics", help="Refuse a machine that computes the last bits differently.")
    ] = False,
) -> None:
    """Train an adapter; run it again and it goes on where it stopped.

    The run folder (output_dir) gets checkpoints, metrics.jsonl, sample sheets and the finished adapter. Ctrl-C saves
    first; so does a file `stop` in the run folder; a file `save` saves without stopping. For several GPUs:
    `accelerate launch -m finetune train RECIPE`.
    """
    run = load_run(recipe, overrides or ())
    train_and_export(run, finetune.Resume(resume.value, accept_data_change, strict_numerics))


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for everything it makes.")] = None,
    family: Annotated[
        Twin | None, typer.Option(help="Run the whole job on a tiny random model of this family instead.")
    ] = None,
) -> None:
    """Teach the embedded base model a subject it has never seen: the whole job, on a CPU, in about three minutes."""
    if family is None:
        finetune.run_demo(output or Path("runs/demo"), ConsoleReporter())
    else:
        finetune.run_twin_demo(family.value, output or Path(f"runs/demo-{family.value}"), ConsoleReporter())


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


def train_and_export(run: Run, how: finetune.Resume | None = None) -> None:
    """Train, export what was learned, and say what came of it."""
    reporter = ConsoleReporter()
    result = finetune.train(run, reporter, how)
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
