"""`data_tools scan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
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

SHOWN_ROWS = 40

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
        print_summary(console, result, pictures=True)
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


def _print_pictures(console: Console, records: Sequence[ImageRecord], told: Collection[str]) -> None:
    """The first few pictures; of the columns that often say nothing those that are `told`."""
    rows = [
        {
            "file": record.file_name,
            "size": f"{record.width} x {record.height}",
            "repeats": str(record.repeats),
            "role": record.role,
            "caption": record.captions[0] + (f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else ""),
            "from": record.source,
            "notes": "; ".join(record.notes),
        }
        for record in records[:SHOWN_ROWS]
    ]
    columns = [name for name in (rows[0] if rows else ()) if name not in ("repeats", "role", "notes") or name in told]
    cells = [[row[name] for name in columns] for row in rows]
    print_table(console, "usable pictures", columns, cells, SHOWN_ROWS, count=len(records))


def print_summary(console: Console, result: ScanResult, pictures: bool = False) -> None:
    """How many pictures there are, where their captions come from, how large they are; before it the first `pictures`.

    All in one go through the records, which may be many and lie on the disk.
    """
    records = result.records
    sources, roles = Counter[str](), Counter[str]()
    samples, told = 0, set()
    small = large = records[0] if records else None
    for record in records:
        sources[record.source] += 1
        roles[record.role] += 1
        samples += record.repeats
        small, large = min(small or record, record, key=_area), max(large or record, record, key=_area)
        if record.notes:
            told.add("notes")
    told |= {"repeats"} if samples != len(records) else set()
    told |= {"role"} if roles["class"] else set()
    if pictures:
        _print_pictures(console, records, told)
    counts = ", ".join(f"{count} from {source}" for source, count in sources.most_common())
    say(
        console,
        f"{counted(len(records), 'usable picture')}, {counted(samples, 'sample')} per epoch"
        + (f"; captions: {counts}" if counts else "")
        + ".",
    )
    if small is not None and large is not None:
        say(console, f"Sizes from {small.width} x {small.height} to {large.width} x {large.height} pixels.")
    known = len(records) - result.decoded
    if known > 0:
        now = counted(result.decoded, "picture was", "pictures were")
        say(console, f"{now} decoded now; the others were known already.")
    if roles["class"]:
        say(console, f"Roles: {roles['instance']} instance, {roles['class']} class.")


def _area(record: ImageRecord) -> int:
    return record.width * record.height
