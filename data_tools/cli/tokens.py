"""`data_tools tokens`."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from data_tools.captioners import AUTO, caption_folder
from data_tools.cli.app import AsJson, Captions, Folder, Strict, Template, TokenizerPlace, Trigger, app
from data_tools.cli.printing import print_table, say
from data_tools.errors import DATA, DataToolsError, counted, stop_for_errors
from data_tools.folder import list_folder
from data_tools.identity import identity_warning
from data_tools.processes import this_process
from data_tools.report.tokens import load_tokenizers
from data_tools.tokens import Count, at_least, count

SHOWN_CHARACTERS = 300
SHOWN_ROWS = 40


@app.command()
def tokens(
    folder: Folder,
    *,
    tokenizer: TokenizerPlace = None,
    captions: Captions = AUTO,
    template: Template = None,
    trigger: Trigger = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Count the tokens of every caption, for each text encoder, and show what falls off its end.

    CLIP reads 77 tokens, two of them for the start and the end; in training `model.prompt_chunks` reads more. Without
    --tokenizer the fewest tokens that CLIP can need are counted.

    Exit code: 0 done, 2 wrong option, 3 a caption cannot be read, or --strict and one is cut.

    Examples:

      finetune data tokens photos

      finetune data tokens photos --tokenizer models/sdxl --trigger "sks dog" --strict
    """
    if this_process().rank:
        return
    console = Console()
    readers = load_tokenizers(tokenizer) if tokenizer else at_least()
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
    stop_for_errors("These captions are not counted:", answer.problems)
    if strict and cut:
        raise DataToolsError(f"--strict: {counted(len(cut), 'caption is', 'captions are')} cut.", exit_code=DATA)


def _print(console: Console, counts: list[Count], cut: list[tuple[str, str, Count]], *, exact: bool) -> None:
    rows = []
    for encoder in dict.fromkeys(each.encoder for each in counts):
        mine = [each for each in counts if each.encoder == encoder]
        sizes = sorted(each.tokens for each in mine)
        lost = sum(bool(each.lost) for each in mine)
        rows.append((encoder, *map(str, (mine[0].room, len(mine), sizes[len(sizes) // 2], sizes[-1], lost))))
    encoders = ("text encoder", "reads", "captions", "median", "longest", "cut")
    print_table(console, "tokens of the captions", encoders, rows)
    losses = [(name, each.encoder, f"{each.tokens} of {each.room}", _begin(each.lost)) for name, _, each in cut]
    columns = ("file", "text encoder", "tokens", "not read")
    print_table(console, "what falls off", columns, losses, SHOWN_ROWS, "; --json lists all")
    if not exact:
        say(console, "A lower bound: rare words are several tokens. For exact numbers give --tokenizer BASE_MODEL.")


def _begin(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"
