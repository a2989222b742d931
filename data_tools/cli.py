"""The command line: `python -m data_tools ...`, mounted by the toolkit as `finetune data ...`.

Commands raise `DataToolsError`; `main` prints it without a traceback and exits with its code.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import ImageColor
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_tools import buckets, manifest
from data_tools.captioners import AUTO, CAPTIONERS, caption_folder
from data_tools.captioners.sidecar import sidecar
from data_tools.errors import DataToolsError, UsageError, grouped, shown
from data_tools.files import write_atomic
from data_tools.folder import list_folder
from data_tools.images import Color
from data_tools.records import ImageRecord
from data_tools.scan import Progress as OnProgress
from data_tools.scan import ScanResult, inspect
from data_tools.scan import scan as scan_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a folder of pictures ready for training: check it, caption it, see its buckets. "
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
        min=1, help="Threads that decode; as many as CPU cores, up to 8, if not given.", show_default=False
    ),
]
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
    with _progress("decoding") as progress:
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
    _print_problems(console, result)
    result.raise_for_errors()
    if write:
        path = manifest.write(result.folder, result.records)
        _say(console, f"Wrote {shown(str(path))} with {len(result.records)} rows.")
    else:
        _say(console, "Ready. Add --write to store this as metadata.jsonl.")


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
    table = _table(
        "caption files to write" if write else "caption files that --write would write", "file", "caption"
    )
    for name, lines in new.items():
        _row(table, _beside(name), " | ".join(lines))
    console.print(table)
    if kept:
        _say(console, f"{len(kept)} pictures have a caption file and keep it; --replace overwrites.")
    if errors:
        raise DataToolsError("Nothing was written:", grouped(errors))
    if write:
        for name, lines in new.items():
            write_atomic(listing.root / _beside(name), ("\n".join(lines) + "\n").encode())
        _say(console, f"Wrote {len(new)} caption files.")
    if listing.metadata:
        _say(
            console,
            f"{listing.metadata[0]} wins over caption files: use `scan --captions sidecar --write` next.",
        )


@app.command()
def bucket(
    folder: Folder,
    *,
    resolution: Annotated[
        int,
        typer.Option(
            min=8,
            help="Side of the square bucket in pixels; all buckets have about this area. "
            "512 for SD1.x, 1024 for SDXL.",
        ),
    ] = 1024,
    multiple: Annotated[int, typer.Option(min=1, help="Step of the sides in pixels.")] = 64,
    min_side: Annotated[
        int | None,
        typer.Option(min=1, help="Shortest side; half the resolution if not given.", show_default=False),
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option(min=1, help="Longest side; twice the resolution if not given.", show_default=False),
    ] = None,
    upscale: Annotated[
        bool, typer.Option("--upscale", help="Enlarge small pictures; otherwise they get a smaller bucket.")
    ] = False,
    files: Annotated[
        bool, typer.Option("--files", help="Also list resize and crop of every picture.")
    ] = False,
    workers: Workers = None,
) -> None:
    """Show which sizes the pictures are trained at, and how much of each is cropped away.

    Reads metadata.jsonl if `scan --write` made one; else decodes the pictures.

    Example:

      finetune data bucket photos --resolution 512
    """
    console = Console()
    sizes = buckets.make_buckets(resolution, multiple, min_side, max_side)
    if manifest.NAME in list_folder(folder).metadata:
        result = ScanResult(folder, manifest.read(folder), [])
    else:
        with _progress("decoding") as progress:
            result = inspect(folder, workers=workers, progress=progress)
    _print_problems(console, result)
    placements = buckets.place(result.records, sizes, upscale=upscale, multiple=multiple)
    table = _table(
        "buckets", "width x height", "pictures", "with repeats", "cropped away", "at most", "in file"
    )
    for row in buckets.plan_table(result.records, placements):
        size = f"{row.bucket[1]} x {row.bucket[0]}" + ("" if row.bucket in sizes else " (small)")
        _row(
            table,
            size,
            str(row.pictures),
            str(row.samples),
            f"{row.mean_lost:.1%}",
            f"{row.max_lost:.1%}",
            row.most_lost,
        )
    console.print(table)
    if files:
        console.print(_placement_table(result.records, placements))
    result.raise_for_errors()


def main() -> None:
    """Run the command line; print errors that are the user's to mend as text."""
    try:
        app(prog_name="data_tools")
    except DataToolsError as error:
        Console(stderr=True).print(error.text(), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _color(text: str) -> Color:
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f"--background {text!r} is no colour; write white, black or #rrggbb.") from error
    return red, green, blue


@contextmanager
def _progress(what: str) -> Iterator[OnProgress | None]:
    """A progress bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _beside(name: str) -> str:
    return str(Path(name).with_suffix(".txt").as_posix())


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    """Cells as plain text: file names and captions must neither style nor steer the terminal."""
    table.add_row(*(Text(shown(cell)) for cell in cells))


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
    table = _table("usable pictures", *told)
    for row in list(zip(*told.values(), strict=True))[:SHOWN_ROWS]:
        _row(table, *row)
    console.print(table)
    if len(records) > SHOWN_ROWS:
        _say(console, f"... and {len(records) - SHOWN_ROWS} more.")


def _captions(record: ImageRecord) -> str:
    return record.captions[0] + (f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else "")


def _print_summary(console: Console, result: ScanResult) -> None:
    records = result.records
    sources = Counter(record.source for record in records)
    samples = sum(record.repeats for record in records)
    counts = ", ".join(f"{count} from {source}" for source, count in sources.most_common())
    _say(
        console,
        f"{len(records)} usable pictures, {samples} samples per epoch"
        + (f"; captions: {counts}" if counts else "")
        + ".",
    )
    if records:
        small, large = (
            chosen(records, key=lambda record: record.width * record.height) for chosen in (min, max)
        )
        _say(console, f"Sizes from {small.width} x {small.height} to {large.width} x {large.height} pixels.")
    roles = Counter(record.role for record in records)
    if roles["class"]:
        _say(console, f"Roles: {roles['instance']} instance, {roles['class']} class.")


def _print_problems(console: Console, result: ScanResult) -> None:
    """Warnings and notes; errors follow as the command's error."""
    for severity, style in (("warning", "yellow"), ("note", "")):
        lines = grouped(result.of(severity))
        if lines:
            _say(console, f"{severity}s:", style="bold")
        for line in lines:
            _say(console, f"  - {line}", style=style)


def _placement_table(records: list[ImageRecord], placements: list[buckets.Placement]) -> Table:
    table = _table(
        "every picture (width x height)",
        "file",
        "picture",
        "resized to",
        "cut out",
        "at left, top",
        "cropped away",
    )
    for record, placement in zip(records, placements, strict=True):
        (height, width), (top, left) = placement.resize, placement.crop_top_left
        _row(
            table,
            record.file_name,
            f"{record.width} x {record.height}",
            f"{width} x {height}",
            f"{placement.bucket[1]} x {placement.bucket[0]}",
            f"{left}, {top}",
            f"{placement.lost:.1%}",
        )
    return table
