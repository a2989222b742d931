"""`data_tools edit`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from data_tools.cli.app import Folder, Reword, Trigger, Without, Write, app
from data_tools.cli.examining import pairs
from data_tools.cli.printing import say, stages
from data_tools.editing import Edit, Plan, apply, parse_pattern, plan, undo
from data_tools.errors import UsageError, counted, grouped, shown, stop_for_errors
from data_tools.folder import list_folder
from data_tools.processes import this_process
from data_tools.wording import Wording

SHOWN_CHANGES = 20

Tags = list[str] | None
Add = Annotated[Tags, typer.Option(metavar="TAG", help="Put a tag at the end where it is missing. Repeatable.")]
Remove = Annotated[Tags, typer.Option(metavar="TAG", help="Take a tag (what stands between commas) out. Repeatable.")]
Regex = Annotated[Tags, typer.Option(metavar="s/OLD/NEW/", help="A regular expression, as in sed. Repeatable.")]
Only = Annotated[
    str | None, typer.Option(metavar="PATTERN", help='Only pictures of such names: "10_sks dog/*".', show_default=False)
]
Undo = Annotated[bool, typer.Option("--undo", help="Take the last edit back; again: the one before it.")]


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
        with stages() as stage:
            names = undo(listing.root, write=write, progress=stage("writing captions"))
        say(console, f"{'Undid' if write else 'Would undo'} the last edit, of {counted(len(names), 'file')}.")
    else:
        found = plan(listing, wanted, only)
        _show(console, found)
        if remove and not found.changes:
            say(console, "--remove takes out whole tags, between commas; --without takes words out of sentences.")
        stop_for_errors("Nothing was written:", found.problems)
        if write and found.files:
            with stages() as stage:
                apply(listing.root, found, stage("writing captions"))
            say(console, f"Wrote {counted(len(found.files), 'file')}; --undo takes it back.")
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
    verb = "changes" if len(found.changes) == 1 else "change"
    emptied = f"; {empty:,} become empty" if empty else ""
    say(console, f"{len(found.changes):,} of {counted(found.seen, 'caption')} {verb}{emptied}.")
    for line in grouped(problem for problem in found.problems if problem.severity != "error"):
        say(console, f"warning: {line}", style="yellow")
