"""The application of `data_tools`, and the arguments its commands share; commands register themselves on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a folder of pictures ready for training: check it, clean it, caption it, see it on one page. "
    "Nothing is changed unless you say --write.",
)

Folder = Annotated[
    Path,
    typer.Argument(help="The folder with the pictures; all its levels are searched.", show_default=False),
]
Template = Annotated[
    str | None,
    typer.Option(
        help='One sentence for all pictures, such as "a photo of sks dog"; '
        "may hold {stem} (file name), {folder} and {number}.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many decode at once; as many as CPU cores, up to 8, if not given.", show_default=False
    ),
]
Background = Annotated[str, typer.Option(help="Colour behind transparent pixels: white, black, #rrggbb.")]
Strict = Annotated[bool, typer.Option("--strict", help="Warnings count as errors: exit code 3.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print everything as one JSON object, for programs and CI.")
]
