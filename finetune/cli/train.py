"""Commands that train: train, demo, build; and the end of every recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import finetune
from finetune import early_checks
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
            help="auto: resume the run in the folder, or start one; must: only resume; never: only start."
        ),
    ] = "auto",
    accept_data_change: Annotated[
        bool, typer.Option("--accept-data-change", help="Resume even if pictures or captions have changed.")
    ] = False,
    strict_numerics: Annotated[
        bool, typer.Option("--strict-numerics", help="Refuse to resume on another GPU or torch: bits differ there.")
    ] = False,
) -> None:
    """Train an adapter; run the same command again to resume.

    The run folder (output_dir) receives checkpoints, metrics.jsonl, sample sheets and the finished adapter. Ctrl-C, or
    a file named `stop` in the run folder, saves and stops; a file named `save` saves and goes on.

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
            help="Run the job on a tiny random model of this family instead (a minute; it cannot draw): "
            f"{', '.join(TWINS)}.",
        ),
    ] = None,
) -> None:
    """Teach the embedded base model a subject it has never seen: the whole job, on a CPU, in about three minutes.

    Nothing is downloaded. It ends with a sheet of pictures before and after, figures and the exported adapter.

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
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the artifact; must not exist yet.")],
    overrides: Overrides = None,
    max_ratio: Annotated[
        float | None,
        typer.Option(
            help="Fail if the validation loss, divided by the base model's, is above this. Default: fail unless it is "
            "below 1 by more than its standard error.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train and package an adapter, for releases and CI: score, verified exports, model card, hashes.

    Exits with code 6 if the adapter is no better than its base. A finished run is packaged without training again.

    Examples:

      finetune build my.yaml -o dist

      finetune build runs/mine -o dist --max-ratio 0.95
    """
    reporter = ConsoleReporter()
    run = load_run(recipe, overrides or ())
    early_checks.building(run, output, max_ratio)
    early_checks.training(run, Resume())
    artifact = finetune.build_artifact(run, output, max_ratio, reporter)
    if artifact is None:
        return
    reporter.table(f"Artifact in {output}", artifact.rows())


def train_and_export(run: Run, how: Resume | None = None) -> None:
    """Train, export what was learned, and say what came of it."""
    early_checks.training(run, how or Resume())
    reporter = ConsoleReporter()
    result = finetune.train(run, reporter, how)
    if not result.is_main_process:
        return
    result.let_go()
    exported = []
    if run.export.formats != ():
        exported = finetune.export_run(run.output_dir, run, run.output_dir / "exports", reporter)
    rows = finetune.exported_rows(exported)
    if result.validation:
        rows.insert(0, ("Loss relative to the base", f"{result.validation} on {result.judged_on}"))
    reporter.table("Done", rows)
    folder = shlex.quote(str(run.output_dir))
    prompt = next(iter((*run.samples.prompts, *run.trigger_words())), "a photo")
    reporter.note(f"Draw with it: finetune sample {shlex.quote(prompt)} --run {folder}")
    if any(item.format == "kohya" for item in exported):
        reporter.note(f"Use it elsewhere: finetune export {folder} -f kohya --install comfyui:FOLDER (or a1111:FOLDER)")
