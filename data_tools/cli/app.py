"""The application of `data_tools`, and the options its commands share; commands register themselves on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.captioners import AUTO, CAPTIONERS
from data_tools.cli.help import Application

app = Application(
    help="Make a folder of pictures ready for training: check it, clean it, caption it, see it on one page. "
    "Nothing is changed unless you say --write."
)

Folder = Annotated[
    Path, typer.Argument(help="The folder with the pictures; all its levels are searched.", show_default=False)
]
Captions = Annotated[
    str,
    typer.Option(
        help=f"Where captions come from: {', '.join([AUTO, *CAPTIONERS])}. auto = metadata.jsonl, .csv or .parquet if "
        "the folder has it; else, picture by picture, a text file of the same name, a kohya folder name, the template."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help='One sentence for all pictures, such as "a photo of sks dog"; '
        "may hold {stem} (file name), {folder} and {number}.",
        show_default=False,
    ),
]
Trigger = Annotated[
    str | None,
    typer.Option(
        help='Your subject\'s word, such as "sks dog": words that most captions share beside it are told; where '
        "captions are written, it is put first if it is missing.",
        show_default=False,
    ),
]
Without = Annotated[
    list[str] | None,
    typer.Option(metavar="WORDS", help="Words left out of every caption, wherever they stand. Repeatable."),
]
Reword = Annotated[
    list[str] | None, typer.Option(metavar="OLD=NEW", help="Words exchanged in every caption, whole ones. Repeatable.")
]
TokenizerPlace = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="What counts tokens: the folder of a base model (all its tokenizers), a tokenizer.json, hub id, or demo.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu; the GPU if there is one.", show_default=False)]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many decode at once; as many as CPU cores, up to 8, if not given.", show_default=False
    ),
]
Background = Annotated[str, typer.Option(help="Colour behind transparent pixels: white, black, #rrggbb.")]
Strict = Annotated[bool, typer.Option("--strict", help="What deserves a look counts as an error: exit code 3.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object, for programs and CI.")]
Write = Annotated[bool, typer.Option("--write", help="Do it; otherwise it is only shown.")]
