"""`data_tools mask`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools.cli.app import Folder, app
from data_tools.cli.examining import stages
from data_tools.cli.printing import add_row, say, table_of
from data_tools.errors import DataToolsError, UsageError, gravest, grouped, shown
from data_tools.files import storage_errors
from data_tools.folder import Listing, list_folder
from data_tools.manifest import read_columns
from data_tools.masking import Done, Find, Looking, Todo, make, plan, sheet
from data_tools.processes import this_process
from data_tools.rows import MASK_COLUMNS

USUAL = "CIDAS/clipseg-rd64-refined"
PREVIEW = 12
"""Without --write so many pictures are looked at."""
SHOWN_ROWS = 40

Of = Annotated[
    list[str] | None,
    typer.Option("--of", metavar="WORDS", help='What counts, such as "a dog"; or a label of the model. Repeatable.'),
]
Alpha = Annotated[bool, typer.Option("--alpha", help="Where the picture is opaque; no model is asked.")]
Model = Annotated[
    str,
    typer.Option(help="A local folder or hub id of a CLIPSeg or semantic segmentation model; safetensors only."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)]
Threshold = Annotated[float, typer.Option(min=0.01, max=1, help="A place counts from this likelihood on.")]
Grow = Annotated[
    float, typer.Option(min=0, max=0.25, help="Widen the masks by this share of the picture's longer side.")
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu; the GPU if there is one.", show_default=False)]
Replace = Annotated[bool, typer.Option("--replace", help="Also make masks/NAME.png again where it is there.")]
Picture = Annotated[
    Path | None, typer.Option(help="Also draw the pictures with what does not count darkened.", show_default=False)
]


# keep: a command's options are its parameters.
@app.command()
def mask(  # noqa: PLR0913
    folder: Folder,
    *,
    of: Of = None,
    alpha: Alpha = False,
    model: Model = USUAL,
    revision: Revision = None,
    threshold: Threshold = 0.5,
    grow: Grow = 0.02,
    batch: Batch = 8,
    device: Device = None,
    replace: Replace = False,
    picture: Picture = None,
    write: Annotated[bool, typer.Option("--write", help="Write the masks; otherwise they are only looked at.")] = False,
) -> None:
    """Make a mask for every picture that has none: where it is white, the loss counts.

    The masks are masks/NAME.png, which training reads by itself and which can be painted over by hand. A model finds
    what --of names; a run that was killed goes on, and under `accelerate launch` the processes share the pictures.
    `clean --focus-on-masks --write` lets crops look at them.

    Exit code: 0 done, 2 wrong option or no weights, 3 pictures without a mask, 5 disk, 8 pickled weights.

    Examples:

      finetune data mask photos --of "a dog" --picture masks.png

      finetune data mask photos --of "a dog" --of "a leash" --threshold 0.4 --write

      finetune data mask cutouts --alpha --write
    """
    if alpha == bool(of):
        raise UsageError("Say what counts: --of WORDS (a model finds it), or --alpha (where the picture is opaque).")
    share = this_process()
    console = Console(quiet=share.rank != 0)
    listing = list_folder(folder)
    todo = plan(listing, _named(listing), replace, share)
    waiting = len(todo.files)
    if not write:
        todo.files = dict(list(todo.files.items())[:PREVIEW])
    found = Done(problems=todo.problems)
    if todo.files:
        looking = Looking(_finder(of, model, revision, device), threshold, grow, batch, picture is not None)
        with stages(share) as stage:
            found = make(listing, todo, looking, write=write, progress=stage("making masks"))
    _show(console, todo, found, write=write, waiting=waiting)
    if picture is not None and share.rank == 0:
        with storage_errors(picture):
            sheet(found).save(picture, format="PNG")
        say(console, f"Drew {len(found.small)} pictures into {shown(str(picture))}.")
    if found.problems:
        count = len(found.problems)
        raise DataToolsError(f"{count} pictures got no mask:", grouped(found.problems), gravest(found.problems))


def _named(listing: Listing) -> dict[str, str]:
    rows = read_columns(listing.root)
    named = {name: [row[column] for column in MASK_COLUMNS if row.get(column)] for name, row in rows.items()}
    return {name: str(masks[0]) for name, masks in named.items() if masks}


def _finder(of: list[str] | None, model: str, revision: str | None, device: str | None) -> Find | None:
    """Torch comes only with a model."""
    if not of:
        return None
    source = importlib.import_module("data_tools.models").Source(model, revision)
    find: Find = importlib.import_module("data_tools.segmenters").load(source, of, device)
    return find


def _show(console: Console, todo: Todo, found: Done, *, write: bool, waiting: int) -> None:
    table = table_of("masks written" if write else "masks of the first pictures", "file", "mask", "counts")
    for name, part in list(found.shares.items())[:SHOWN_ROWS]:
        add_row(table, name, todo.files[name], f"{part:.0%}")
    if found.shares:
        console.print(table)
    if len(found.shares) > SHOWN_ROWS:
        say(console, f"... and {len(found.shares) - SHOWN_ROWS:,} more.")
    if todo.kept:
        say(console, f"{len(todo.kept)} pictures have a mask and keep it; --replace makes it again.")
    if not todo.files:
        say(console, "No picture waits for a mask: there is nothing to do.")
    elif write:
        say(console, f"Wrote {len(found.shares)} masks; paint over any of them as you like.")
    else:
        say(console, f"Looked at {len(todo.files)} of {waiting} pictures; --write makes the masks of all.")
