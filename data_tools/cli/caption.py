"""`data_tools caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools.captioners import CAPTIONERS, caption_folder
from data_tools.captioners.sidecar import sidecar
from data_tools.cli.app import Folder, Template, app
from data_tools.cli.printing import add_row, say, table_of
from data_tools.errors import DataToolsError, UsageError, grouped
from data_tools.files import write_atomic
from data_tools.folder import list_folder


@app.command()
def caption(
    folder: Folder,
    *,
    captions: Annotated[
        str | None,
        typer.Option(help=f"Where the words come from: {', '.join(CAPTIONERS)}.", show_default=False),
    ] = None,
    template: Template = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Also overwrite text files that are there; otherwise these pictures keep theirs.",
        ),
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write the text files; otherwise they are only shown.")
    ] = False,
) -> None:
    """Write a caption file beside every picture that has none: cat.png gets cat.txt, to be edited by hand.

    Examples:

      finetune data caption photos --template "a photo of sks dog, {stem}"

      finetune data caption photos --captions filename --write
    """
    console = Console()
    source = captions or ("template" if template is not None else None)
    if source is None or source not in CAPTIONERS:
        raise UsageError(
            f"--captions is {source!r}; choose one of {', '.join(CAPTIONERS)}, or give --template."
        )
    listing = list_folder(folder)
    answer = caption_folder(listing, source, template)
    kept = set() if replace else set(sidecar(listing, None).captions)
    new = {name: found.captions for name, found in answer.captions.items() if name not in kept}
    errors = [
        problem
        for problem in answer.problems
        if problem.severity == "error" and problem.file_name not in kept
    ]
    table = table_of(
        "caption files to write" if write else "caption files that --write would write", "file", "caption"
    )
    for name, lines in new.items():
        add_row(table, _beside(name), " | ".join(lines))
    console.print(table)
    if kept:
        say(console, f"{len(kept)} pictures have a caption file and keep it; --replace overwrites.")
    if errors:
        raise DataToolsError("Nothing was written:", grouped(errors))
    if write:
        for name, lines in new.items():
            write_atomic(listing.root / _beside(name), ("\n".join(lines) + "\n").encode())
        say(console, f"Wrote {len(new)} caption files.")
    if listing.metadata:
        say(
            console,
            f"{listing.metadata[0]} wins over caption files: use `scan --captions sidecar --write` next.",
        )


def _beside(name: str) -> str:
    return str(Path(name).with_suffix(".txt").as_posix())
