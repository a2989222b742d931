"""`data_tools import`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools import manifest
from data_tools.cli.app import AsJson, Strict, app
from data_tools.cli.printing import conclude, exit_code, print_json, print_problems, say, stages
from data_tools.cli.scan import print_summary
from data_tools.errors import counted, shown
from data_tools.images import WHITE
from data_tools.importing import import_pictures
from data_tools.memory import open_memory
from data_tools.processes import this_process
from data_tools.scan import scan
from data_tools.sources import Order


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, .zip or .tar, webdataset shards ('s-{000..009}.tar'), .parquet, a kohya dataset .toml, a "
            "save_to_disk folder, or hub:owner/name.",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder to fill.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which part of a hub dataset.")] = "train",
    image_column: Annotated[
        str | None, typer.Option(help="Column of a table with the pictures; found if not given.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of a table with the captions; found if not given.")
    ] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Bring pictures from elsewhere into a new folder with a manifest, checked as by
    scan.

    Archives are looked through before anything is written: links, names that
    lead out of the folder and decompression bombs refuse the whole archive. A
    killed import goes on when it is started again. The folder loads with
    load_dataset("imagefolder") and is what `data.folder` of a recipe wants.

    Exit code: 0 ready, 2 wrong option, 3 something must be mended first, 5
    the disk, 8 an unsafe archive.

    Examples:

      finetune data import photos.zip -o photos

      finetune data import dataset_config.toml -o photos

      finetune data import hub:owner/name --split train -o photos
    """
    if this_process().rank:
        return
    console = Console()
    order = Order(source, split, image_column, text_column)
    with stages() as stage:
        done = import_pictures(order, output, stage("importing"))
        result = scan(output, progress=stage("looking at pictures"), memory=open_memory(output, WHITE)[0])
    # keep: once each, because a folder's oddities come along with its files.
    result = replace(result, problems=list(dict.fromkeys([*done.problems, *result.problems])))
    if as_json:
        print_json(result, exit_code=exit_code(result, strict), new=done.new, kept=done.kept)
    else:
        say(console, f"{counted(done.new, 'new file')}, {done.kept:,} that were there already ({done.source}).")
        print_summary(console, result)
        print_problems(console, result)
    conclude(result, strict)
    path = manifest.write(result.folder, result.records)
    if not as_json:
        say(console, f"Wrote {shown(str(path))} with {counted(len(result.records), 'row')}.")
