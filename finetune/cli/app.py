"""The `finetune` application and the arguments its commands share; commands register themselves on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.demo import BASE_DIR

app = typer.Typer(
    name="finetune",
    help="Turn a folder of pictures into a LoRA adapter for Stable Diffusion, and prove that it works.\n\n"
    "First time here: `finetune demo` shows the whole job in three minutes, without a GPU or a download. "
    "Then: `finetune init sd15-lora > my.yaml`, edit two lines, `finetune train my.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[
    str,
    typer.Argument(help="A recipe (.py), a .yaml or .json file, a run folder, or a built-in recipe such as sd15-lora."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change any field: --set adapter.rank=32. Repeatable.", metavar="SECTION.FIELD=VALUE"),
]


def base_path(name: str) -> Path:
    """The folder or file of a base that is read without loading it; `demo` is the embedded one, as in `model.base`."""
    return BASE_DIR if name == "demo" else Path(name).expanduser()
