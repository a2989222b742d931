"""Commands that print runs: show, init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import Overrides, Recipe, app, complete_recipe
from finetune.errors import ConfigError
from finetune.run_files import load_run, recipe_names
from finetune.show import annotated_yaml


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a run with every field, its value and what it means; the output is a YAML file that trains.

    Examples:

      finetune show runs/mine

      finetune show sd15-lora --set adapter.rank=32 > my.yaml
    """
    typer.echo(annotated_yaml(load_run(recipe, overrides or ())), nl=False)


@app.command()
def init(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            show_default=False,
            autocompletion=complete_recipe,
            help="A built-in recipe; without one they are listed.",
        ),
    ] = "",
) -> None:
    """Print a built-in recipe as YAML to start from: `finetune init sd15-lora > my.yaml`.

    Then set output_dir and, in the section data, folder and captions; `finetune train my.yaml` trains it.
    """
    recipes = recipe_names()
    if not name:
        for known, path in recipes.items():
            typer.echo(f"{known:<24} {_first_docstring_line(path)}")
        return
    if name not in recipes:
        load_run(name)
    typer.echo(annotated_yaml(load_run(recipes.get(name, Path(name)))), nl=False)


def _first_docstring_line(path: Path) -> str:
    lines = [line.strip().strip('"') for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty.")
    return lines[0]
