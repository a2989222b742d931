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
    """Print every field of a run with its value and meaning, as YAML that can be edited and trained.

    A run is a recipe, one of your files or a run folder, with the overrides of --set.

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
            help="A built-in recipe; without a name, all are listed.",
        ),
    ] = "",
) -> None:
    """Print a built-in recipe as YAML to start from: `finetune init sd15-lora > my.yaml`.

    Then set output_dir, data.folder and data.captions in the file, and train it with `finetune train my.yaml`.
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
