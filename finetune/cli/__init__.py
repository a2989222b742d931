"""The `finetune` command: parse, call, print. What it does lives elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import typer
from rich.console import Console
from typer.models import CommandInfo, TyperInfo

from data_tools.cli import app as data_app
from data_tools.cli.bucket import BASE_READERS
from data_tools.errors import DataToolsError
from finetune.cli import cache, convert, export, inspect, merge, plan, sample, show, train, watch
from finetune.cli.app import Overrides, app
from finetune.config import Run
from finetune.data.training_size import base_training_size
from finetune.errors import UserError
from finetune.quiet import quiet_libraries
from finetune.run_files import change_run

COMMANDS = (train, watch, plan, show, sample, export, inspect, convert, merge, cache)
"""Modules whose import puts their commands on the application."""
INTERRUPTED = 130
"""Exit code after Ctrl-C where nothing could be finished first."""
PANELS = {
    "Start here": ("demo", "init", "show"),
    "Your pictures": ("cache", "data"),
    "Train": ("plan", "train", "watch"),
    "Use the result": ("sample", "export", "build", "push"),
    "Adapter files from any trainer": ("inspect", "convert", "merge", "resize", "extract", "diff"),
}
"""Where and in which order the help lists the commands; a test holds the names against the commands."""


def _arrange() -> None:
    app.add_typer(data_app, name="data", help="Look after a folder of pictures: scan, clean, caption, mask, report.")
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    place_of = list(panel_of)
    everything: list[CommandInfo | TyperInfo] = [*app.registered_commands, *app.registered_groups]
    for registered in everything:
        registered.rich_help_panel = panel_of[command_name(registered)]
    app.registered_commands.sort(key=lambda registered: place_of.index(command_name(registered)))


def command_name(registered: CommandInfo | TyperInfo) -> str:
    """What the user types."""
    return str(registered.name or getattr(registered.callback, "__name__", ""))


_arrange()
BASE_READERS.append(base_training_size)


def run_recipe(run: Run) -> None:
    """The end of every recipe: train its `RUN` with the overrides given on the command line.

    `accelerate launch recipes/sd15_lora.py --set data.folder=photos --set output_dir=runs/mine`
    """

    def command(overrides: Overrides = None) -> None:
        train.train_and_export(change_run(run, overrides or ()))

    command.__doc__ = f"Train this recipe on {run.model.base}; `finetune show` prints every field for --set."
    _guarded(lambda: typer.run(command))


def main() -> None:
    """Entry point: user errors become a message and an exit code, never a traceback."""
    _guarded(app)


def _guarded(call: Callable[[], object]) -> None:
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    errors = Console(stderr=True, highlight=False, emoji=False)
    try:
        call()
    except (UserError, DataToolsError) as error:
        errors.print(str(error), markup=False, style="red", soft_wrap=True)
        raise SystemExit(error.exit_code) from None
    except SystemExit as done:
        if done.code == INTERRUPTED:
            errors.print("Interrupted. What was finished is kept; the same command goes on from there.", style="red")
        raise


__all__ = ["COMMANDS", "app", "main", "run_recipe"]
