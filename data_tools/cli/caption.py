"""`data_tools caption`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from data_tools.beside import Todo
from data_tools.captioners import CAPTIONERS, caption_folder
from data_tools.captioners.sidecar import sidecar
from data_tools.captioners.vision import VISION, Asking, open_viewer
from data_tools.captioning import Done, look, plan, save, worded
from data_tools.cli.app import Device, Folder, Revision, Reword, Template, Trigger, Without, Write, app
from data_tools.cli.examining import pairs
from data_tools.cli.printing import print_table, say, stages
from data_tools.errors import UsageError, counted, stop_for_errors
from data_tools.folder import Listing, list_folder
from data_tools.identity import identity_warning
from data_tools.processes import ALONE, Share, this_process
from data_tools.wording import Wording

PREVIEW = 4
"""Without --write a model looks at so many pictures; to look at all of them and forget it would cost hours."""
SHOWN_ROWS = 40
DEFAULT = Asking()

Captions = Annotated[
    str | None,
    typer.Option(
        help=f"Where the words come from: {', '.join(CAPTIONERS)}; or a model that looks: "
        f"{', '.join(f'{name} ({model.about})' for name, model in VISION.items())}.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="A local folder or a hub id in place of the model's usual weights.", show_default=False),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="What the model is told; repeatable, each prompt gives a caption of its own. Florence-2: <CAPTION>, "
        "<DETAILED_CAPTION>, <MORE_DETAILED_CAPTION>; BLIP: the beginning of the caption.",
    ),
]
Number = Annotated[
    int, typer.Option(min=1, max=16, help="Captions for each prompt: the best ones of a beam search as wide.")
]
Length = Annotated[int, typer.Option(min=1, help="A caption ends after so many new tokens.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Pictures at once; the model's own number if not given.", show_default=False)
]
General = Annotated[float, typer.Option(min=0, max=1, help="wd_tagger: probability from which a tag counts.")]
Character = Annotated[float, typer.Option(min=0, max=1, help="wd_tagger: the same for the names of characters.")]
Prefix = Annotated[str, typer.Option(help="Put before every caption, as it is.")]
Suffix = Annotated[str, typer.Option(help="Put behind every caption, as it is.")]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Also overwrite text files that are there; otherwise these pictures keep theirs. Begins anew."
    ),
]


# keep: a command's options are its parameters.
@app.command()
def caption(  # noqa: PLR0913
    folder: Folder,
    *,
    captions: Captions = None,
    template: Template = None,
    model: Model = None,
    revision: Revision = None,
    prompt: Prompts = None,
    number: Number = DEFAULT.count,
    length: Length = DEFAULT.length,
    batch: Batch = None,
    device: Device = None,
    general: General = DEFAULT.general,
    character: Character = DEFAULT.character,
    trigger: Trigger = None,
    prefix: Prefix = "",
    suffix: Suffix = "",
    without: Without = None,
    reword: Reword = None,
    replace: Replace = False,
    write: Write = False,
) -> None:
    """Write a caption file beside every picture that has none: cat.png gets cat.txt, to be edited by hand.

    A model that looks writes after each batch: start the command again after a kill and it goes on. Under
    `accelerate launch` the processes share the pictures. Its weights must be safetensors (or ONNX), from a local
    folder or a hub id; code that comes with a model is never run.

    Exit code: 0 done, 2 wrong option or no weights, 3 pictures without a caption, 5 disk, 8 pickled weights.

    Examples:

      finetune data caption photos --template "a photo of sks dog, {stem}"

      finetune data caption photos --captions florence2 --trigger "sks dog" --without brown --write

      accelerate launch -m data_tools caption photos --captions qwen_vl --model models/qwen --write
    """
    share, source = this_process(), captions or ("template" if template is not None else None)
    asking = Asking(model, revision, tuple(prompt or ()), number, length, batch, device, general, character)
    wording = Wording(tuple(pairs("--reword", reword)), tuple(without or ()), prefix, suffix, trigger)
    if source is not None and source in VISION:
        if template is not None:
            raise UsageError(f"A template is given, but captions={source!r} never uses it; leave out one of the two.")
        _by_looking(list_folder(folder), source, asking, wording, share, replace=replace, write=write)
    elif source is None or source not in CAPTIONERS:
        raise UsageError(
            f"--captions is {source!r}; choose one of {', '.join([*CAPTIONERS, *VISION])}, or give --template."
        )
    elif asking != DEFAULT:
        raise UsageError(f"--captions {source} asks no model; leave out the options that are for {', '.join(VISION)}.")
    elif share.rank == 0:
        _by_reading(list_folder(folder), source, template, wording, replace=replace, write=write)


def _by_reading(
    listing: Listing, source: str, template: str | None, wording: Wording, *, replace: bool, write: bool
) -> None:
    """All pictures at once; nothing is written unless all of them get a caption."""
    console = Console()
    todo = plan(listing, replace, ALONE)
    answer = caption_folder(listing, source, template)
    kept = set(todo.kept)
    errors = [problem for problem in answer.problems if problem.severity == "error" and problem.file_name not in kept]
    done = Done(worded(answer, list(todo.files), wording), [*todo.problems, *errors])
    _show(console, todo, done, "caption files to write" if write else "caption files that --write would write")
    stop_for_errors("Nothing was written:", done.problems)
    if write:
        save(listing, todo, done.captions)
        say(console, f"Wrote {counted(len(done.captions), 'caption file')}.")
    _conclude(console, listing, done, wording)


def _by_looking(
    listing: Listing, source: str, asking: Asking, wording: Wording, share: Share, *, replace: bool, write: bool
) -> None:
    """Batch by batch; a picture that cannot be captioned is told at the end and stops no other."""
    console = Console(quiet=share.rank != 0)
    whole = plan(listing, replace, share)
    todo = whole if write else whole.first(PREVIEW)
    done = Done(problems=todo.problems)
    if todo.files:
        viewer = open_viewer(source, asking)
        with stages(share) as stage:
            progress = stage("captioning")
            done = look(listing, todo, viewer, wording, batch=viewer.batch, write=write, progress=progress)
    _show(console, todo, done, "caption files written" if write else "captions of the first pictures")
    mine = f" (process 1 of {share.count}; each one does its share)" if share.count > 1 else ""
    if not todo.files:
        say(console, "No picture waits for a caption: there is nothing to do.")
    elif write:
        say(console, f"Wrote {counted(len(done.captions), 'caption file')}{mine}.")
    else:
        pictures = counted(len(whole.files), "picture")
        say(console, f"Looked at {len(todo.files)} of {pictures}; --write captions all of them.")
    _conclude(console, listing, done, wording)
    stop_for_errors("These pictures got no caption:", done.problems)


def _show(console: Console, todo: Todo, done: Done, title: str) -> None:
    rows = [(todo.files[name], " | ".join(lines)) for name, lines in done.captions.items()]
    print_table(console, title, ("file", "caption"), rows, SHOWN_ROWS)
    if todo.kept:
        kept = counted(len(todo.kept), "picture has", "pictures have")
        say(console, f"{kept} a caption file already; --replace overwrites it.")


def _conclude(console: Console, listing: Listing, done: Done, wording: Wording) -> None:
    if wording.trigger is not None:
        there = {name: found.captions for name, found in sidecar(listing, None).captions.items()}
        warning = identity_warning(there | done.captions, wording.trigger, (wording.prefix, wording.suffix))
        if warning is not None:
            say(console, f"warning: {warning}", style="yellow")
    if listing.metadata:
        say(console, f"{listing.metadata[0]} wins over caption files: use `scan --captions sidecar --write` next.")
