"""`data_tools tokens`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools.captioners import AUTO, caption_folder
from data_tools.cli.app import AsJson, Folder, Template, app
from data_tools.cli.examining import Captions
from data_tools.cli.printing import add_row, say, table_of
from data_tools.errors import DATA, DataToolsError, UsageError, grouped
from data_tools.folder import list_folder
from data_tools.identity import identity_warning
from data_tools.processes import this_process
from data_tools.report.tokens import load_tokenizers
from data_tools.tokens import Count, at_least, count

SHOWN_ROWS = 40
DEMO = "demo"
"""The toolkit's embedded base model, where the toolkit is installed beside this package."""


@app.command()
def tokens(
    folder: Folder,
    *,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A folder of a base model (all its tokenizers are asked), a tokenizer.json, a hub id, or demo. "
            "Without it the fewest tokens that CLIP can need are counted.",
            show_default=False,
        ),
    ] = None,
    captions: Captions = AUTO,
    template: Template = None,
    trigger: Annotated[
        str | None,
        typer.Option(help="Your subject's word: also tell which words most captions share.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when a caption is cut.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the tokens of every caption, for each text encoder, and show what falls off its end.

    CLIP reads 77 tokens, two of them for the start and the end; in training `model.prompt_chunks` reads more.

    Exit code: 0 done, 2 wrong option, 3 a caption cannot be read, or --strict and one is cut.

    Examples:

      finetune data tokens photos

      finetune data tokens photos --tokenizer models/sdxl --trigger "sks dog" --strict
    """
    if this_process().rank:
        return
    console = Console()
    readers = load_tokenizers(_demo() if tokenizer == DEMO else tokenizer) if tokenizer else at_least()
    answer = caption_folder(list_folder(folder), captions, template)
    counts = {
        name: [(line, count(line, readers)) for line in found.captions] for name, found in answer.captions.items()
    }
    flat = [(name, line, each) for name, lines in counts.items() for line, row in lines for each in row]
    cut = [row for row in flat if row[2].lost]
    said = {name: found.captions for name, found in answer.captions.items()}
    warning = identity_warning(said, trigger) if trigger else None
    if as_json:
        document = {
            "exact": tokenizer is not None,
            "captions": [{"file_name": name, "caption": line, **vars(each)} for name, line, each in flat],
            "shared_words": str(warning) if warning else None,
        }
        typer.echo(json.dumps(document, ensure_ascii=True, indent=1))
    else:
        _print(console, [each for _, _, each in flat], cut, exact=tokenizer is not None)
        if warning is not None:
            say(console, f"warning: {warning}", style="yellow")
    errors = [problem for problem in answer.problems if problem.severity == "error"]
    if errors:
        raise DataToolsError("These captions are not counted:", grouped(errors))
    if strict and cut:
        raise DataToolsError(f"--strict: {len(cut)} captions are cut.", exit_code=DATA)


def _print(console: Console, counts: list[Count], cut: list[tuple[str, str, Count]], *, exact: bool) -> None:
    table = table_of("tokens of the captions", "text encoder", "reads", "captions", "median", "longest", "cut")
    for encoder in dict.fromkeys(each.encoder for each in counts):
        mine = [each for each in counts if each.encoder == encoder]
        sizes = sorted(each.tokens for each in mine)
        lost = sum(bool(each.lost) for each in mine)
        add_row(
            table, encoder, str(mine[0].room), str(len(mine)), str(sizes[len(sizes) // 2]), str(sizes[-1]), str(lost)
        )
    console.print(table)
    if cut:
        losses = table_of("what falls off", "file", "text encoder", "tokens", "not read")
        for name, _, each in cut[:SHOWN_ROWS]:
            add_row(losses, name, each.encoder, f"{each.tokens} of {each.room}", each.lost)
        console.print(losses)
        if len(cut) > SHOWN_ROWS:
            say(console, f"... and {len(cut) - SHOWN_ROWS:,} more; --json lists all.")
    if not exact:
        say(console, "A lower bound: rare words are several tokens. For exact numbers give --tokenizer BASE_MODEL.")


def _demo() -> str:
    toolkit = find_spec("finetune")
    folder = Path(toolkit.origin).parent / "demo" / "base" if toolkit and toolkit.origin else None
    if folder is None or not folder.is_dir():
        raise UsageError("--tokenizer demo: the toolkit's embedded base is not installed; give a folder or a hub id.")
    return str(folder)
