"""The `finetune` command: parse, call, print. What it does lives elsewhere."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import finetune
from data_tools.cli import app as data_app
from data_tools.errors import DataToolsError
from finetune.config import Run
from finetune.console import ConsoleReporter
from finetune.errors import ConfigError, UserError
from finetune.run_files import change_run, load_run, recipe_names
from finetune.show import annotated_yaml

app = typer.Typer(
    name="finetune",
    help="Turn a folder of pictures into a LoRA adapter for Stable Diffusion, and prove that it works.\n\n"
    "First time here: `finetune demo` shows the whole job in three minutes, without a GPU or a download. "
    "Then: `finetune init sd15-lora > my.yaml`, edit two lines, `finetune train my.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data", help="Look at a folder of pictures before training: scan, caption, bucket.")

Recipe = Annotated[
    str,
    typer.Argument(help="A recipe (.py), a .yaml or .json file, a run folder, or a built-in recipe such as sd15-lora."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change any field: --set adapter.rank=32. Repeatable.", metavar="SECTION.FIELD=VALUE"),
]


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train an adapter; run it again and it goes on where it stopped.

    The run folder (output_dir) gets checkpoints, metrics.jsonl, sample sheets and the finished adapter. Ctrl-C saves
    first. For several GPUs: `accelerate launch -m finetune train RECIPE`.
    """
    _train_and_export(load_run(recipe, overrides or ()))


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a run with every field, its value and what it means; the output is a YAML file that trains."""
    typer.echo(annotated_yaml(load_run(recipe, overrides or ())), nl=False)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="A built-in recipe; without one they are listed.")] = "",
) -> None:
    """Print a built-in recipe as YAML to start from: `finetune init sd15-lora > my.yaml`."""
    recipes = recipe_names()
    if not name:
        for known, path in recipes.items():
            typer.echo(f"{known:<24} {_first_docstring_line(path)}")
        return
    if name not in recipes:
        load_run(name)
    typer.echo(annotated_yaml(load_run(recipes.get(name, Path(name)))), nl=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything it makes.")] = Path("runs/demo"),
) -> None:
    """Teach the embedded base model a subject it has never seen: the whole job, on a CPU, in three minutes."""
    finetune.run_demo(output, ConsoleReporter())


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


def run_recipe(run: Run) -> None:
    """The end of every recipe: train its `RUN` with the overrides given on the command line.

    `accelerate launch recipes/sd15_lora.py --set data.folder=photos --set output_dir=runs/mine`
    """

    def command(overrides: Overrides = None) -> None:
        _train_and_export(change_run(run, overrides or ()))

    command.__doc__ = f"Train this recipe on {run.model.base}; `finetune show` prints every field for --set."
    _guarded(lambda: typer.run(command))


def main() -> None:
    """Entry point: user errors become a message and an exit code, never a traceback."""
    _guarded(app)


def _train_and_export(run: Run) -> None:
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


def _quiet_libraries() -> None:
    """What the libraries tell their developers is not for our users; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _guarded(call: Callable[[], object]) -> None:
    _quiet_libraries()
    errors = Console(stderr=True, highlight=False)
    try:
        call()
    except (UserError, DataToolsError) as error:
        errors.print(str(error), markup=False, style="red", soft_wrap=True)
        raise SystemExit(error.exit_code) from None


def _first_docstring_line(path: Path) -> str:
    lines = [line.strip().strip('"') for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty.")
    return lines[0]
