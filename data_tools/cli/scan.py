"""`data_tools scan`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from PIL import ImageColor
from rich.console import Console

from data_tools import manifest
from data_tools.captioners import AUTO, CAPTIONERS
from data_tools.cli.app import Folder, Template, Workers, app
from data_tools.cli.printing import add_row, print_problems, progress_bar, say, table_of
from data_tools.errors import UsageError, shown
from data_tools.images import Color
from data_tools.records import ImageRecord
from data_tools.scan import ScanResult
from data_tools.scan import scan as scan_folder

SHOWN_ROWS = 12


@app.command()
def scan(
    folder: Folder,
    *,
    captions: Annotated[
        str,
        typer.Option(
            help=f"Where captions come from: {', '.join([AUTO, *CAPTIONERS])}. "
            "auto = metadata.jsonl or .csv if the folder has it; else, picture by picture, "
            "a text file of the same name, a kohya folder name, "
            "the template."
        ),
    ] = AUTO,
    template: Template = None,
    background: Annotated[
        str, typer.Option(help="Colour behind transparent pixels: white, black, #rrggbb.")
    ] = "white",
    workers: Workers = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Write metadata.jsonl into the folder, if there is no error. The datasets library reads "
            "it as an imagefolder.",
        ),
    ] = False,
) -> None:
    """Check every picture and caption of a folder; list all that is wrong or left out, and what to do.

    Layouts that are understood: text files beside the pictures (cat.png, cat.txt), kohya folders (10_sks
    dog/), metadata.jsonl or metadata.csv with file_name and text. Each line of a text file is one caption.

    Exit code: 0 ready, 2 wrong option, 3 something must be mended first.

    Examples:

      finetune data scan photos --template "a photo of sks dog"

      finetune data scan photos --captions sidecar --write
    """
    console = Console()
    with progress_bar("decoding") as progress:
        result = scan_folder(
            folder,
            captions=captions,
            template=template,
            background=_color(background),
            workers=workers,
            progress=progress,
        )
    _print_pictures(console, result.records)
    _print_summary(console, result)
    print_problems(console, result)
    result.raise_for_errors()
    if write:
        path = manifest.write(result.folder, result.records)
        say(console, f"Wrote {shown(str(path))} with {len(result.records)} rows.")
    else:
        say(console, "Ready. Add --write to store this as metadata.jsonl.")


def _color(text: str) -> Color:
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f"--background {text!r} is no colour; write white, black or #rrggbb.") from error
    return red, green, blue


def _print_pictures(console: Console, records: list[ImageRecord]) -> None:
    """The first few pictures, without the columns that would say nothing."""
    columns: dict[str, list[str]] = {
        "file": [record.file_name for record in records],
        "size": [f"{record.width} x {record.height}" for record in records],
        "repeats": [str(record.repeats) for record in records],
        "role": [str(record.role) for record in records],
        "caption": [_captions(record) for record in records],
        "from": [record.source for record in records],
        "notes": ["; ".join(record.notes) for record in records],
    }
    plain = {"repeats": "1", "role": "instance", "notes": ""}
    told = {name: cells for name, cells in columns.items() if set(cells) != {plain.get(name)}}
    table = table_of("usable pictures", *told)
    for row in list(zip(*told.values(), strict=True))[:SHOWN_ROWS]:
        add_row(table, *row)
    console.print(table)
    if len(records) > SHOWN_ROWS:
        say(console, f"... and {len(records) - SHOWN_ROWS} more.")


def _captions(record: ImageRecord) -> str:
    return record.captions[0] + (f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else "")


def _print_summary(console: Console, result: ScanResult) -> None:
    records = result.records
    sources = Counter(record.source for record in records)
    samples = sum(record.repeats for record in records)
    counts = ", ".join(f"{count} from {source}" for source, count in sources.most_common())
    say(
        console,
        f"{len(records)} usable pictures, {samples} samples per epoch"
        + (f"; captions: {counts}" if counts else "")
        + ".",
    )
    if records:
        small, large = (
            chosen(records, key=lambda record: record.width * record.height) for chosen in (min, max)
        )
        say(console, f"Sizes from {small.width} x {small.height} to {large.width} x {large.height} pixels.")
    roles = Counter(record.role for record in records)
    if roles["class"]:
        say(console, f"Roles: {roles['instance']} instance, {roles['class']} class.")
