"""`data_tools mask`."""

from __future__ import annotations

import importlib
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools.beside import Todo
from data_tools.cli.app import Device, Folder, Revision, Write, app
from data_tools.cli.printing import print_table, say, stages
from data_tools.errors import UsageError, counted, grouped, shown, stop_for_errors
from data_tools.files import storage_errors
from data_tools.folder import Listing, list_folder
from data_tools.manifest import read_columns
from data_tools.masking import Done, Looking, make, plan, sheet
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
    typer.Option(
        help="A local folder or hub id, safetensors only: CLIPSeg, semantic segmentation, or a detector, whose boxes "
        "become masks (OWLv2 or Grounding DINO, told in words; DETR, YOLOS, RT-DETR, ..., for faces or persons)."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1,
        help="A place counts from this likelihood on; what is usual for the model if not given: "
        "0.5, for OWLv2 0.2, for Grounding DINO 0.3.",
        show_default=False,
    ),
]
Grow = Annotated[
    float, typer.Option(min=0, max=0.25, help="Widen the masks by this share of the picture's longer side.")
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
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
    threshold: Threshold = None,
    grow: Grow = 0.02,
    batch: Batch = 8,
    device: Device = None,
    replace: Replace = False,
    picture: Picture = None,
    write: Write = False,
) -> None:
    """Make a mask for every picture that has none: where it is white, the loss counts.

    The masks are masks/NAME.png, which training reads by itself and which can be painted over by hand. A model finds
    what --of names; a run that was killed goes on, and under `accelerate launch` the processes share the pictures.
    `clean --focus-on-masks --write` lets crops look at them, `clean --zoom 0.5 --write` zooms to them. A picture in
    which nothing is found is listed and gets no mask.

    Exit code: 0 done, 2 wrong option or no weights, 3 pictures in which nothing is found, 5 disk, 8 pickled weights.

    Examples:

      finetune data mask photos --of "a dog" --picture masks.png

      finetune data mask photos --of "a face" --model google/owlv2-base-patch16-ensemble --grow 0.1 --write

      finetune data mask cutouts --alpha --write
    """
    if alpha == bool(of):
        raise UsageError("Say what counts: --of WORDS (a model finds it), or --alpha (where the picture is opaque).")
    share = this_process()
    console = Console(quiet=share.rank != 0)
    listing = list_folder(folder)
    whole = plan(listing, _named(listing), replace, share)
    todo = whole if write else whole.first(PREVIEW)
    found = Done(problems=todo.problems)
    if todo.files:
        looking = _looking(of, model, revision, device)
        looking = replace_fields(
            looking, threshold=threshold or looking.threshold, grow=grow, batch=batch, keep_small=picture is not None
        )
        with stages(share) as stage:
            found = make(listing, todo, looking, write=write, progress=stage("making masks"))
    _show(console, todo, found, write=write, waiting=len(whole.files))
    if picture is not None and share.rank == 0:
        with storage_errors(picture):
            sheet(found).save(picture, format="PNG")
        say(console, f"Drew {counted(len(found.small), 'picture')} into {shown(str(picture))}.")
    stop_for_errors("These pictures got no mask:", found.problems)


def _named(listing: Listing) -> dict[str, str]:
    rows = read_columns(listing.root)
    named = {name: [row[column] for column in MASK_COLUMNS if row.get(column)] for name, row in rows.items()}
    return {name: str(masks[0]) for name, masks in named.items() if masks}


def _looking(of: list[str] | None, model: str, revision: str | None, device: str | None) -> Looking:
    """Torch comes only with a model."""
    if not of:
        return Looking(None)
    source = importlib.import_module("data_tools.models").Source(model, revision)
    finder = importlib.import_module("data_tools.segmenters").load(source, of, device)
    return Looking(finder.find, finder.threshold)


def _show(console: Console, todo: Todo, found: Done, *, write: bool, waiting: int) -> None:
    rows = [(name, todo.files[name], f"{part:.0%}") for name, part in found.shares.items()]
    title = "masks written" if write else "masks of the first pictures"
    print_table(console, title, ("file", "mask", "counts"), rows, SHOWN_ROWS)
    for line in grouped(problem for problem in found.problems if problem.severity != "error"):
        say(console, line)
    if todo.kept:
        kept = counted(len(todo.kept), "picture has", "pictures have")
        say(console, f"{kept} a mask already; --replace makes it again.")
    if not todo.files:
        say(console, "No picture waits for a mask: there is nothing to do.")
    elif write:
        say(console, f"Wrote {counted(len(found.shares), 'mask')}; paint over any of them as you like.")
    else:
        say(console, f"Looked at {len(todo.files)} of {counted(waiting, 'picture')}; --write makes the masks of all.")
