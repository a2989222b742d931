"""`data_tools bucket`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_tools import buckets, manifest
from data_tools.cli.app import Folder, Workers, app
from data_tools.cli.printing import add_row, print_problems, progress_bar, table_of
from data_tools.folder import list_folder
from data_tools.records import ImageRecord
from data_tools.scan import ScanResult, inspect


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
        with progress_bar("decoding") as progress:
            result = inspect(folder, workers=workers, progress=progress)
    print_problems(console, result)
    placements = buckets.place(result.records, sizes, upscale=upscale, multiple=multiple)
    table = table_of(
        "buckets", "width x height", "pictures", "with repeats", "cropped away", "at most", "in file"
    )
    for row in buckets.plan_table(result.records, placements):
        size = f"{row.bucket[1]} x {row.bucket[0]}" + ("" if row.bucket in sizes else " (small)")
        add_row(
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


def _placement_table(records: list[ImageRecord], placements: list[buckets.Placement]) -> Table:
    table = table_of(
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
        add_row(
            table,
            record.file_name,
            f"{record.width} x {record.height}",
            f"{width} x {height}",
            f"{placement.bucket[1]} x {placement.bucket[0]}",
            f"{left}, {top}",
            f"{placement.lost:.1%}",
        )
    return table
