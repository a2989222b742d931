"""`data_tools edit`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from data_tools.cli.app import Folder, app
from data_tools.cli.examining import pairs
from data_tools.cli.printing import say
from data_tools.editing import Edit, Plan, apply, parse_pattern, plan, undo
from data_tools.errors import DataToolsError, UsageError, grouped, shown
from data_tools.folder import list_folder
from data_tools.processes import this_process
from data_tools.wording import Wording

SHOWN_CHANGES = 20

Tags = list[str] | None
Add = Annotated[Tags, typer.Option(metavar="TAG", help="Put a tag at the end where it is missing. Repeatable.")]
Remove = Annotated[Tags, typer.Option(metavar="TAG", help="Take a tag (what stands between commas) out. Repeatable.")]
Reword = Annotated[Tags, typer.Option(metavar="OLD=NEW", help="Exchange words, whole ones only. Repeatable.")]
Without = Annotated[Tags, typer.Option(metavar="WORDS", help="Take words out, wherever they stand. Repeatable.")]
Regex = Annotated[Tags, typer.Option(metavar="s/OLD/NEW/", help="A regular expression, as in sed. Repeatable.")]
Trigger = Annotated[
    str | None, typer.Option(help="Your subject's word: put first where it is missing.", show_default=False)
]
Only = Annotated[
    str | None, typer.Option(metavar="PATTERN", help='Only pictures of such names: "10_sks dog/*".', show_default=False)
]

Undo = Annotated[bool, typer.Option("--undo", help="Take the last edit back; again: the one before it.")]
Write = Annotated[bool, typer.Option("--write", help="Do it; otherwise the changes are only shown.")]


# keep: a command's options are its parameters.
@app.command()
def edit(  # noqa: PLR0913
    folder: Folder,
    *,
    add: Add = None,
    remove: Remove = None,
    reword: Reword = None,
    without: Without = None,
    regex: Regex = None,
    trigger: Trigger = None,
    only: Only = None,
    take_back: Undo = False,
    write: Write = False,
) -> None:
    """Change the captions of many pictures at once: see the diff first, then --write; --undo takes it back.

    Edited are .txt and .caption files and metadata.jsonl. A file that somebody changed after an edit is never undone
    over.

    Exit code: 0 done, 2 wrong option, 3 a caption that cannot be read, or was changed since, 5 disk.

    Examples:

      finetune data edit photos --remove "red hair" --add outdoors

      finetune data edit photos --reword "hound=dog" --regex "s/ +,/,/" --write

      finetune data edit photos --undo --write
    """
    if this_process().rank:
        return
    console = Console()
    wording = Wording(tuple(pairs("--reword", reword)), tuple(without or ()), trigger=trigger)
    wanted = Edit(tuple(map(parse_pattern, regex or ())), tuple(remove or ()), tuple(add or ()), wording)
    if take_back == (wanted != Edit()):
        raise UsageError("Say --add, --remove, --reword, --without, --regex or --trigger, or --undo and none of them.")
    listing = list_folder(folder)
    if take_back:
        names = undo(listing.root, write=write)
        say(console, f"{'Undid' if write else 'Would undo'} the last edit, of {len(names)} files.")
    else:
        found = plan(listing, wanted, only)
        _show(console, found)
        if remove and not found.changes:
            say(console, "--remove takes out whole tags, between commas; --without takes words out of sentences.")
        errors = [problem for problem in found.problems if problem.severity == "error"]
        if errors:
            raise DataToolsError("Nothing was written:", grouped(errors))
        if write and found.files:
            apply(listing.root, found)
            say(console, f"Wrote {len(found.files)} files; --undo takes it back.")
    if not write:
        say(console, "Nothing is written. Add --write to do it.")


def _show(console: Console, found: Plan) -> None:
    for change in found.changes[:SHOWN_CHANGES]:
        console.print(Text(shown(change.place), style="bold"), soft_wrap=True)
        console.print(Text(f"- {shown(change.old)}", style="red"), soft_wrap=True)
        console.print(Text(f"+ {shown(change.new)}", style="green"), soft_wrap=True)
    if len(found.changes) > SHOWN_CHANGES:
        say(console, f"... and {len(found.changes) - SHOWN_CHANGES:,} more.")
    empty = sum(not change.new for change in found.changes)
    emptied = f"; {empty:,} become empty" if empty else ""
    say(console, f"{len(found.changes):,} of {found.seen:,} captions change{emptied}.")
    for line in grouped(problem for problem in found.problems if problem.severity != "error"):
        say(console, f"warning: {line}", style="yellow")
