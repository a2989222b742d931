"""`data_tools report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from data_tools.captioners import AUTO
from data_tools.clean import Cleaning, assist, examine
from data_tools.cli.app import AsJson, Background, Captions, Folder, Strict, Template, TokenizerPlace, Workers, app
from data_tools.cli.bucket import Base, Multiple, Preset, Resolution, Upscale, choose
from data_tools.cli.examining import Against, Limits, Verdicts, opened, settings
from data_tools.cli.printing import say
from data_tools.errors import DataToolsError, UsageError, counted, gravest, shown
from data_tools.files import storage_errors, write_atomic
from data_tools.report import Plan, gather, load_tokenizers, make_thumbnails, render
from data_tools.report.facts import BATCH_SIZES

MEGABYTE = 2**20
STALE = "whose drop is not yet in the manifest (clean --write)"
STRICT = {
    "warnings": ("warning", ""),
    "review": ("picture to look at", "pictures to look at"),
    "cut": ("caption longer than is read", "captions longer than are read"),
    "not_stored": (f"picture {STALE}", f"pictures {STALE}"),
}
"""What else of the summary --strict asks about."""


Output = Annotated[
    Path, typer.Option("--output", "-o", help="The page; a .json of the same name is written beside it.")
]
BatchSizes = Annotated[
    list[int] | None, typer.Option(min=1, help="For the steps per epoch; repeatable. 1, 2, 4 and 8 if not given.")
]
Megabytes = Annotated[
    float, typer.Option(min=0, help="Megabytes of thumbnails; pictures beyond are counted, not drawn.")
]


# keep: a command's options are its parameters.
@app.command()
def report(  # noqa: PLR0913
    folder: Folder,
    *,
    output: Output = Path("report.html"),
    base: Base = None,
    resolution: Resolution = None,
    multiple: Multiple = None,
    preset: Preset = None,
    upscale: Upscale = False,
    batch_size: BatchSizes = None,
    tokenizer: TokenizerPlace = None,
    thumbnails: Megabytes = 8.0,
    limit: Limits = None,
    verdict: Verdicts = None,
    against: Against = None,
    captions: Captions = AUTO,
    template: Template = None,
    background: Background = "white",
    workers: Workers = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Show a folder on one page: thumbnails with crops, buckets, sizes, copies, captions, weights, what is skipped.

    The page needs no network and opens from disk; it prints, and follows light and dark. Nothing in the folder is
    changed. Verdicts can be clicked together on the page; it writes the command that stores them.

    Exit code: 0 ready, 2 wrong option, 3 errors in the folder (the page is written all the same and shows them),
    or with --strict anything that deserves a look.

    Examples:

      finetune data report photos --base models/sd15 -o photos.html

      finetune data report photos --preset sdxl-paper --strict --json
    """
    console = Console()
    rules = settings(limit, verdict)
    sizes, step, name = choose(base, resolution, multiple, preset=preset)
    plan = Plan(sizes, step, upscale, name, tuple(batch_size or BATCH_SIZES))
    words = tokenizer or (base if base and not Path(base).is_file() else None)
    tokenizers = load_tokenizers(words) if words else {}
    page, data = _places(output)
    with opened(
        folder, rules, captions=captions, template=template, background=background, workers=workers, against=against
    ) as options:
        if options.share.rank:
            assist(folder, options)
            return
        cleaning = _without_our_own(examine(folder, options), (page, data))
        facts = gather(cleaning, plan, tokenizers)
        small = make_thumbnails(
            cleaning.scan.folder,
            cleaning.judged,
            int(thumbnails * MEGABYTE),
            background=options.background,
            workers=workers,
            progress=options.stage("thumbnails"),
        )
    text = json.dumps(facts, ensure_ascii=False, indent=1, allow_nan=False)
    with storage_errors(page):
        write_atomic(page, render(facts, small).encode("utf-8", errors="replace"))
        write_atomic(data, f"{text}\n".encode("utf-8", errors="replace"))
    if as_json:
        typer.echo(text)
    else:
        _tell(console, facts, page, data)
    _conclude(cleaning, facts, strict)


def _places(output: Path) -> tuple[Path, Path]:
    """The page and the data beside it.

    Raises:
        UsageError: the place is a folder, or there is no folder for it.
    """
    if output.is_dir() or output.suffix.lower() == ".json":
        raise UsageError(f"--output {shown(str(output))} is no name for a page; write something like report.html.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {shown(str(output))}: the folder is not there; make it first.")
    return output, output.with_suffix(".json")


def _without_our_own(cleaning: Cleaning, ours: Sequence[Path]) -> Cleaning:
    """A page written into the folder itself is no stray file of it."""
    names = {
        path.resolve().relative_to(cleaning.scan.folder).as_posix()
        for path in ours
        if path.resolve().is_relative_to(cleaning.scan.folder)
    }
    problems = [problem for problem in cleaning.scan.problems if problem.file_name not in names]
    return replace(cleaning, scan=replace(cleaning.scan, problems=problems))


def _tell(console: Console, facts: dict[str, Any], page: Path, data: Path) -> None:
    summary = facts["summary"]
    steps = ", ".join(f"{count:,} at batch {size}" for size, count in facts["steps_per_epoch"].items())
    say(
        console,
        f"{counted(summary['pictures'], 'picture')}: {summary['keep']:,} keep, {summary['review']:,} review, "
        f"{summary['drop']:,} drop; {counted(summary['errors'], 'error')}, {counted(summary['warnings'], 'warning')}.",
    )
    say(
        console,
        f"{counted(summary['samples'], 'sample')} per epoch in {counted(summary['buckets'], 'bucket')}, "
        f"{summary['mean_lost']:.1%} cropped away on average; steps per epoch: {steps}.",
    )
    say(console, f"Open {shown(str(page))}; {shown(data.name)} beside it holds the same in numbers.")


def _conclude(cleaning: Cleaning, facts: dict[str, Any], strict: bool) -> None:
    summary = facts["summary"]
    asked = {"errors": ("error", ""), **(STRICT if strict else {})}
    found = [counted(summary[key], *words) for key, words in asked.items() if summary[key]]
    if found:
        raise DataToolsError(
            f"{shown(facts['folder'])} is not ready: {', '.join(found)}; the page tells each of them.",
            exit_code=max(3, gravest(cleaning.scan.problems)),
        )
