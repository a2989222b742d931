"""The `finetune` application and the arguments its commands share; commands register themselves on it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli.help import Application
from finetune import __version__
from finetune.config import Run
from finetune.demo import BASE_DIR
from finetune.run_files import RUN_FILE, fields_of, recipe_names

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
"""What a bug report should name the versions of."""

app = Application(
    name="finetune",
    help="Turn a folder of pictures into a LoRA adapter for Stable Diffusion, and prove that it works.\n\n"
    "First time here: `finetune demo` shows the whole job in three minutes, without a GPU or a download. "
    "Then: `finetune init sd15-lora > my.yaml`, name your data.folder and output_dir in it, `finetune train my.yaml`.",
)


def _tell_versions(asked: bool) -> None:
    if asked:
        typer.echo(f"finetune {__version__}, Python {platform.python_version()} on {platform.platform()}")
        for name in LIBRARIES:
            typer.echo(f"{name} {_version(name)}")
        raise typer.Exit


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "is not installed"


@app.callback()
def finetune(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_versions, is_eager=True, help="Print versions, for bug reports."),
    ] = False,
) -> None:
    """Options of the application itself; what it is stands above."""


def complete_recipe(incomplete: str) -> list[str]:
    """What the shell may put for a recipe: built-in names, recipe files, folders."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [
        f"{path}/" if path.is_dir() and not (path / RUN_FILE).is_file() else str(path)
        for path in there
        if path.is_dir() or path.suffix in {".py", ".yaml", ".yml", ".json"}
    ]
    return [text for text in (*recipe_names(), *paths) if text.startswith(incomplete)]


def complete_field(incomplete: str) -> list[str]:
    """What the shell may put for --set: every field of a run."""
    return [f"{name}=" for name in _fields(Run, "") if name.startswith(incomplete)]


def _fields(section: type, prefix: str) -> Iterator[str]:
    for name, inner in fields_of(section).items():
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _fields(inner, f"{prefix}{name}.")


Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        autocompletion=complete_recipe,
        help="A built-in recipe such as sd15-lora, a .yaml, .json or .py file, or a run folder.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        autocompletion=complete_field,
        help="Change any field: --set adapter.rank=32. Repeatable; `finetune show RECIPE` lists them all.",
    ),
]


def base_path(name: str) -> Path:
    """The folder or file of a base that is read without loading it; `demo` is the embedded one, as in `model.base`."""
    return BASE_DIR if name == "demo" else Path(name).expanduser()
