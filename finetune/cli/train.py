"""Commands that train: train, demo, build; and the end of every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import finetune
from finetune import before
from finetune.cli.app import Overrides, Recipe, app
from finetune.cli.options import choice
from finetune.config import Run
from finetune.console import ConsoleReporter
from finetune.run_files import load_run
from finetune.training.resume import Mode, Resume

TWINS = ("sd1", "sd2", "sdxl", "sdxl_refiner", "sd3", "flux")
"""Families with a tiny twin; a test holds the names against the families' own table."""


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        choice(
            "answer (--resume)",
            get_args(Mode),
            help="What to do about a run in the folder. auto: go on with it, or begin; must: refuse to begin; never: "
            "refuse to go on."
        ),
    ] = "auto",
    accept_data_change: Annotated[
        bool, typer.Option("--accept-data-change", help="Go on although pictures or captions have changed.")
    ] = False,
    strict_numerics: Annotated[
        bool, typer.Option("--strict-numerics", help="Refuse to go on where last bits differ: another GPU or torch.")
    ] = False,
) -> None:
    """Train an adapter; run it again and it goes on where it stopped.

    The run folder (output_dir) gets checkpoints, metrics.jsonl, sample sheets and the finished adapter. Ctrl-C saves
    first; so does a file `stop` in the run folder; a file `save` saves without stopping.

    Examples:

      finetune train my.yaml

      finetune train sd15-lora --set data.folder=photos --set output_dir=runs/mine

      accelerate launch --multi_gpu -m finetune train my.yaml
    """
    run = load_run(recipe, overrides or ())
    train_and_export(run, Resume(cast(Mode, resume), accept_data_change, strict_numerics))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for everything it makes. Default: runs/demo.")
    ] = None,
    family: Annotated[
        str | None,
        choice(
            "kind of model (--family)",
            TWINS,
            metavar="NAME",
            help="Run the job on a tiny random model of this kind instead, in a minute; it draws nothing: "
            f"{', '.join(TWINS)}.",
        ),
    ] = None,
) -> None:
    """Teach the embedded base model a subject it has never seen: the whole job, on a CPU, in about three minutes.

    Nothing is downloaded. At the end stand a sheet of pictures before and after, figures and the exported adapter.

    Examples:

      finetune demo

      finetune demo --family sdxl -o runs/demo-sdxl
    """
    if family is None:
        finetune.run_demo(output or Path("runs/demo"), ConsoleReporter())
    else:
        finetune.run_twin_demo(family, output or Path(f"runs/demo-{family}"), ConsoleReporter())


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
    """Build an adapter as an artifact, for CI: check, train, score, export, verify, model card, hashes.

    Fails with exit code 6 where the adapter is no better than its base. A finished run folder is packed, not trained
    anew.

    Examples:

      finetune build my.yaml -o dist

      finetune build runs/mine -o dist --max-ratio 0.95
    """
    reporter = ConsoleReporter()
    run = load_run(recipe, overrides or ())
    before.building(run, output)
    before.training(run, Resume())
    artifact = finetune.build_artifact(run, output, max_ratio, reporter)
    if artifact is None:
        return
    reporter.table(f"Artifact in {output}", artifact.rows())


def train_and_export(run: Run, how: Resume | None = None) -> None:
    """Train, export what was learned, and say what came of it."""
    before.training(run, how or Resume())
    reporter = ConsoleReporter()
    result = finetune.train(run, reporter, how)
    if not result.is_main_process:
        return
    result.let_go()
    rows = []
    if run.export.formats:
        exported = finetune.export_run(run.output_dir, run, run.output_dir / "exports", reporter)
        rows = finetune.exported_rows(exported)
    if result.validation:
        value, error = result.validation.value, result.validation.error
        rows.insert(0, ("Loss against the base", f"{value:.3f} +- {error:.3f} on {result.judged_on}"))
    reporter.table("Done", rows)
