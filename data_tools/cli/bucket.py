"""`data_tools bucket`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from data_tools import buckets, manifest
from data_tools.buckets import PRESETS, Placement, Size
from data_tools.cli.app import AsJson, Folder, Workers, app
from data_tools.cli.printing import print_problems, print_table, say, stages
from data_tools.errors import UsageError, shown
from data_tools.folder import list_folder
from data_tools.plan_picture import save_plan
from data_tools.processes import this_process
from data_tools.records import ImageRecord
from data_tools.scan import ScanResult, inspect
from data_tools.verdicts import without_dropped

Resolution = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Side of the square bucket in pixels; all buckets have about this area. 512 for SD1.x; if not given "
        "that of --base, else 1024.",
        show_default=False,
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(min=1, help="Step of the sides in pixels; that of --base, else 64, if not given.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The base model that will be trained: its folder, its .safetensors file, or demo. Gives the sizes that "
        "training takes; no weight is read.",
        show_default=False,
    ),
]
MinSide = Annotated[
    int | None, typer.Option(min=1, help="Shortest side; half the resolution if not given.", show_default=False)
]
MaxSide = Annotated[
    int | None, typer.Option(min=1, help="Longest side; twice the resolution if not given.", show_default=False)
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"A list of buckets by name, in place of the numbers: {', '.join(PRESETS)}.", show_default=False),
]
Upscale = Annotated[
    bool, typer.Option("--upscale", help="Enlarge small pictures; otherwise they get a smaller bucket.")
]

BASE_READERS: list[Callable[[str, int | None], tuple[int, int]]] = []
"""Who knows base models: (base, resolution or None) -> (resolution, step), pixels. This package knows none; the
toolkit that trains enters its own rule here."""


# keep: a command's options are its parameters.
@app.command()
def bucket(  # noqa: PLR0913
    folder: Folder,
    *,
    base: Base = None,
    resolution: Resolution = None,
    multiple: Multiple = None,
    min_side: MinSide = None,
    max_side: MaxSide = None,
    preset: Preset = None,
    upscale: Upscale = False,
    files: Annotated[bool, typer.Option("--files", help="Also list resize and crop of every picture.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the plan into this PNG file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    workers: Workers = None,
) -> None:
    """Show which sizes the pictures are trained at, and how much of each is cropped away.

    Reads metadata.jsonl if `scan --write` made one, without the pictures whose verdict is drop; else decodes the
    pictures. Pictures with focus_x and focus_y (shares of width and height) in the manifest are cropped around that
    point, with focus_width and focus_height zoomed to it; the others are cut in the middle.

    Examples:

      finetune data bucket photos --base models/sd15

      finetune data bucket photos --preset sdxl-paper --picture plan.png
    """
    if this_process().rank:
        return
    console = Console()
    sizes, step, _ = choose(base, resolution, multiple, min_side, max_side, preset)
    result = _read(folder, workers)
    found, misfits = buckets.fit(result.records, sizes, upscale=upscale, multiple=step)
    fitting = [(record, place) for record, place in zip(result.records, found, strict=True) if place is not None]
    records, placements = [record for record, _ in fitting], [place for _, place in fitting]
    result.problems.extend((*misfits, *buckets.zoom_notes(records, placements)))
    if not as_json:
        print_problems(console, result)
    if as_json:
        typer.echo(json.dumps(_to_json(records, placements), ensure_ascii=False, indent=1))
    else:
        _print_buckets(console, records, placements, sizes)
        if files:
            _print_placements(console, records, placements)
    if picture is not None:
        save_plan(records, placements, picture)
        if not as_json:
            say(console, f"Drew the plan into {shown(str(picture))}.")
    result.raise_for_errors()


def choose(
    base: str | None,
    resolution: int | None,
    multiple: int | None,
    min_side: int | None = None,
    max_side: int | None = None,
    preset: str | None = None,
) -> tuple[list[Size], int | None, str]:
    """The buckets asked for, the step of extra ones for small pictures, and how to call them.

    Raises:
        UsageError: a preset or a base and numbers beside it that contradict it; or sizes that leave no bucket.
    """
    numbers = {"multiple": multiple, "min-side": min_side, "max-side": max_side}
    if preset is not None:
        _alone(f"--preset {preset} is a whole list of sizes", numbers | {"base": base, "resolution": resolution})
        return buckets.preset(preset), None, f"The list {preset}"
    if base is not None:
        _alone(f"--base {shown(base)} says how its buckets grow", numbers)
        if not BASE_READERS:
            raise UsageError("--base is known to `finetune data`, not to this command alone; give --resolution.")
        resolution, multiple = BASE_READERS[0](base, resolution)
    side, step = resolution or 1024, multiple or 64
    return buckets.make_buckets(side, step, min_side, max_side), step, f"{side} px in steps of {step}"


def _alone(why: str, others: dict[str, Any]) -> None:
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if given:
        raise UsageError(f"{why}; leave out {', '.join(given)}.")


def _read(folder: Path, workers: int | None) -> ScanResult:
    if manifest.NAME not in list_folder(folder).metadata:
        with stages() as stage:
            return inspect(folder, workers=workers, progress=stage("looking at pictures"))
    kept, left_out = without_dropped(manifest.read(folder))
    return ScanResult(folder, kept, left_out)


def _print_buckets(
    console: Console, records: Sequence[ImageRecord], placements: list[Placement], sizes: list[Size]
) -> None:
    rows = [
        (
            f"{row.bucket[1]} x {row.bucket[0]}" + ("" if row.bucket in sizes else " (small)"),
            str(row.pictures),
            str(row.samples),
            f"{row.mean_lost:.1%}",
            f"{row.max_lost:.1%}",
            row.most_lost,
        )
        for row in buckets.plan_table(records, placements)
    ]
    columns = ("width x height", "pictures", "with repeats", "cropped away", "at most", "in file")
    print_table(console, "buckets", columns, rows)


def _print_placements(console: Console, records: Sequence[ImageRecord], placements: list[Placement]) -> None:
    rows = [
        (
            record.file_name,
            f"{record.width} x {record.height}",
            f"{placement.resize[1]} x {placement.resize[0]}",
            f"{placement.bucket[1]} x {placement.bucket[0]}",
            f"{placement.crop_top_left[1]}, {placement.crop_top_left[0]}",
            f"{placement.lost:.1%}",
        )
        for record, placement in zip(records, placements, strict=True)
    ]
    columns = ("file", "picture", "resized to", "cut out", "at left, top", "cropped away")
    print_table(console, "every picture (width x height)", columns, rows)


def _to_json(records: Sequence[ImageRecord], placements: list[Placement]) -> dict[str, Any]:
    """All sizes are [width, height] and all points [left, top], pixels."""
    return {
        "buckets": [row.as_json() for row in buckets.plan_table(records, placements)],
        "pictures": [
            {"file_name": record.file_name, "size": [record.width, record.height], **placement.as_json()}
            for record, placement in zip(records, placements, strict=True)
        ],
    }
