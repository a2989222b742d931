"""`data_tools scan`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools import manifest
from data_tools.captioners import AUTO
from data_tools.cli.app import AsJson, Background, Captions, Folder, Strict, Template, Workers, app
from data_tools.cli.examining import color
from data_tools.cli.printing import conclude, exit_code, print_json, print_problems, print_table, say, stages
from data_tools.errors import UsageError, counted, shown
from data_tools.folder import list_folder
from data_tools.images import Color
from data_tools.inspection import Looking, inspect_share
from data_tools.memory import Memory, open_memory
from data_tools.processes import this_process
from data_tools.records import ImageRecord
from data_tools.scan import ScanResult
from data_tools.scan import scan as scan_folder

SHOWN_ROWS = 12

Fresh = Annotated[bool, typer.Option("--fresh", help="Decode everything again; otherwise unchanged pictures are not.")]
Write = Annotated[
    bool,
    typer.Option(
        "--write",
        help="Write metadata.jsonl into the folder, if there is no error. The datasets library reads "
        "it as an imagefolder.",
    ),
]


@app.command()
# keep: a command's options are its parameters.
def scan(  # noqa: PLR0913
    folder: Folder,
    *,
    captions: Captions = AUTO,
    template: Template = None,
    background: Background = "white",
    workers: Workers = None,
    fresh: Fresh = False,
    strict: Strict = False,
    as_json: AsJson = False,
    write: Write = False,
) -> None:
    """Check every picture and caption of a folder; list all that is wrong or left
    out, and what to do.

    Layouts that are understood: text files beside the pictures (cat.png,
    cat.txt or cat.json), kohya folders (10_sks dog/), metadata.jsonl, .csv or
    .parquet with file_name and text, masks (masks/cat.png or
    cat-masklabel.png). Each line of a text file is one caption. For archives,
    parquet files, kohya's TOML and the hub: finetune data import.

    What was decoded is remembered outside the folder, so a second scan and
    one that was killed are quick. Under `accelerate launch` each process
    decodes its share.

    Exit code: 0 ready, 2 wrong option, 3 something must be mended first, 5
    unreadable, 8 unsafe (a link or a row that leads out of the folder).

    Examples:

      finetune data scan photos --template "a photo of sks dog"

      finetune data scan photos --captions sidecar --write

      accelerate launch --num_processes 4 -m data_tools scan photos --write
    """
    console = Console()
    looking = Looking(color(background), workers)
    memory = _memory(folder, looking.background, fresh)
    if memory is not None and memory.share.rank:
        inspect_share(list_folder(folder), replace(looking, memory=memory))
        return
    with stages() as stage:
        result = scan_folder(
            folder,
            captions=captions,
            template=template,
            background=looking.background,
            workers=workers,
            progress=stage("looking at pictures"),
            memory=memory,
        )
    code = exit_code(result, strict)
    if as_json:
        print_json(result, exit_code=code)
    else:
        _print_pictures(console, result.records)
        print_summary(console, result)
        print_problems(console, result)
    conclude(result, strict)
    if write:
        path = manifest.write(result.folder, result.records)
        _say(console, f"Wrote {shown(str(path))} with {counted(len(result.records), 'row')}.", as_json)
    else:
        _say(console, "Ready. Add --write to store this as metadata.jsonl.", as_json)


def _memory(folder: Path, background: Color, fresh: bool) -> Memory | None:
    """What earlier scans saw. Without a writable place for it one process goes on alone; several cannot."""
    share = this_process()
    if fresh and share.count > 1:
        raise UsageError("--fresh is for one process; run it once alone, or point FINETUNE_CACHE to a new folder.")
    memory, reason = open_memory(folder, background, share, fresh)
    if reason is not None:
        say(Console(stderr=True), f"Nothing is remembered for the next scan: {reason}", style="yellow")
    return memory


def _say(console: Console, text: str, as_json: bool) -> None:
    if not as_json:
        say(console, text)


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
    print_table(console, "usable pictures", list(told), list(zip(*told.values(), strict=True)), SHOWN_ROWS)


def _captions(record: ImageRecord) -> str:
    return record.captions[0] + (f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else "")


def print_summary(console: Console, result: ScanResult) -> None:
    """How many pictures there are, where their captions come from, how large they are."""
    records = result.records
    sources = Counter(record.source for record in records)
    samples = sum(record.repeats for record in records)
    counts = ", ".join(f"{count} from {source}" for source, count in sources.most_common())
    say(
        console,
        f"{counted(len(records), 'usable picture')}, {counted(samples, 'sample')} per epoch"
        + (f"; captions: {counts}" if counts else "")
        + ".",
    )
    if records:
        small, large = (chosen(records, key=lambda record: record.width * record.height) for chosen in (min, max))
        say(console, f"Sizes from {small.width} x {small.height} to {large.width} x {large.height} pixels.")
    known = len(records) - result.decoded
    if known > 0:
        now = counted(result.decoded, "picture was", "pictures were")
        say(console, f"{now} decoded now; the others were known already.")
    roles = Counter(record.role for record in records)
    if roles["class"]:
        say(console, f"Roles: {roles['instance']} instance, {roles['class']} class.")
