"""`data_tools clean`."""

from __future__ import annotations

import fnmatch
import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from data_tools import clean as cleaning_of
from data_tools.captioners import AUTO
from data_tools.clean import Cleaning, Judged, Options, Score
from data_tools.cli.app import AsJson, Background, Captions, Folder, Strict, Template, Workers, Write, app
from data_tools.cli.examining import Against, Limits, Verdicts, opened, pairs, raise_for_broken, settings
from data_tools.cli.printing import print_table, say
from data_tools.errors import DataToolsError, UsageError, counted, shown
from data_tools.focus import focus_on_masks
from data_tools.records import ImageRecord, Verdict
from data_tools.scoring import SCORERS, ScorerSpec, choose_scorers
from data_tools.verdicts import BETWEEN

SHOWN_ROWS = 40

Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Decide by hand: keep this picture; * stands for anything. Repeatable."),
]
Review = Annotated[list[str] | None, typer.Option(metavar="NAME", help="By hand: to be looked at.")]
Drop = Annotated[list[str] | None, typer.Option(metavar="NAME", help="By hand: leave out of training.")]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"Also ask a model: {', '.join(SCORERS)}, or a name of your own. Repeatable; --limit NAME=NUMBER "
        "says from where on it counts. Scores are kept in metadata.jsonl.",
    ),
]
ScoreModels = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PLACE", help="A local folder or a hub id in place of the scorer's own model."),
]
ScoreLabels = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=LABEL", help="The label of a classifier whose probability is the score."),
]
FocusOnMasks = Annotated[
    bool,
    typer.Option("--focus-on-masks", help="Crop around what masks mark: sets focus_x and focus_y in the manifest."),
]
Zoom = Annotated[
    float | None,
    typer.Option(
        metavar="MARGIN",
        min=0,
        max=20,
        help="The same, and zoom to it with a margin on each side, as a share of its size: with 0.5 a face fills half "
        "the width. Sets focus_width and focus_height too; nothing is enlarged, your pictures stay as they are.",
        show_default=False,
    ),
]


# keep: a command's options are its parameters.
@app.command()
def clean(  # noqa: PLR0913
    folder: Folder,
    *,
    limit: Limits = None,
    verdict: Verdicts = None,
    against: Against = None,
    keep: Keep = None,
    review: Review = None,
    drop: Drop = None,
    score: Scores = None,
    score_model: ScoreModels = None,
    score_label: ScoreLabels = None,
    masks: FocusOnMasks = False,
    zoom: Zoom = None,
    captions: Captions = AUTO,
    template: Template = None,
    background: Background = "white",
    workers: Workers = None,
    write: Write = False,
    reset: Annotated[
        bool, typer.Option("--reset", help="Take all verdicts out of metadata.jsonl again, those by hand as well.")
    ] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Judge every picture: keep, review or drop, each with its number and limit. Nothing is deleted or moved.

    Finds exact, near and mirrored copies (also of another folder: --against), pictures that are too small, too
    narrow, blurred, under- or over-exposed, flat, or in a frame. With --write the verdicts stand in metadata.jsonl,
    where they can be changed by hand; a verdict changed by hand stays. Training leaves out `drop` and lists it.
    A run that was killed goes on; under `accelerate launch` the processes share the work.

    Exit code: 0 done, 2 wrong option, 3 a file cannot be used, or --strict and a verdict other than keep.

    Examples:

      finetune data clean photos --limit blur=40 --verdict near_copy=drop

      finetune data clean photos --against holdout --write

      finetune data clean photos --drop "IMG_00*" --keep IMG_0042.jpg --write

      finetune data clean photos --zoom 0.5 --write
    """
    console = Console()
    scorers = choose_scorers(
        score or (), dict(pairs("--score-model", score_model)), dict(pairs("--score-label", score_label))
    )
    rules = settings(limit, verdict, scorers)
    with opened(
        folder, rules, captions=captions, template=template, background=background, workers=workers, against=against
    ) as options:
        asked = _scoring(scorers, options) if scorers else None
        if options.share.rank:
            cleaning_of.assist(folder, options, asked)
            return
        judged = cleaning_of.examine(folder, options, asked)
    if masks or zoom is not None:
        judged = _focused(console, judged, workers, zoom, as_json)
    judged = cleaning_of.decide(judged, _by_hand(judged, {"keep": keep, "review": review, "drop": drop}))
    if reset:
        _reset(console, judged, write)
        return
    if as_json:
        typer.echo(json.dumps(to_json(judged), ensure_ascii=False, indent=1))
    else:
        _print(console, judged)
    _conclude(console, judged, write=write, strict=strict, as_json=as_json)


def _conclude(console: Console, judged: Cleaning, *, write: bool, strict: bool, as_json: bool) -> None:
    if write:
        path = cleaning_of.write(judged)
        _tell(console, as_json, f"Wrote the verdicts into {shown(str(path))}; change `verdict` there as you like.")
    else:
        raise_for_broken(judged)
        _tell(console, as_json, "Nothing is written. Add --write to store the verdicts in metadata.jsonl.")
    counts = judged.counts()
    if strict and counts["review"] + counts["drop"]:
        raise DataToolsError(f"--strict: {counts['review']} to look at, {counts['drop']} to drop.")


def _scoring(specs: Sequence[ScorerSpec], options: Options) -> Score:
    """Load the models now, so that a wrong one is told before the folder is read; torch comes only with them."""
    models = importlib.import_module("data_tools.scorers")
    loaded = [models.load_scorer(spec) for spec in specs]

    def score(root: Path, records: Sequence[ImageRecord]) -> Sequence[Mapping[str, float]]:
        scores: Sequence[Mapping[str, float]] = models.score_all(
            root,
            records,
            loaded,
            background=options.background,
            workers=options.workers,
            progress=options.stage("asking models"),
            share=options.share,
        )
        return scores

    return score


def _focused(console: Console, judged: Cleaning, workers: int | None, zoom: float | None, as_json: bool) -> Cleaning:
    records = focus_on_masks(judged.scan.folder, [each.record for each in judged.judged], workers, zoom)
    masked = sum(record.mask_file is not None for record in records)
    if not masked:
        raise UsageError("No picture has a mask to look at; `finetune data mask` makes some.")
    seen = f"{counted(masked, 'picture')} of {len(records):,}"
    told = "Crops look at" if zoom is None else "Crops zoom to"
    _tell(console, as_json, f"{told} what the masks of {seen} mark; a focus that was set by hand stays.")
    pairs_of = zip(judged.judged, records, strict=True)
    return replace(judged, judged=[replace(each, record=record) for each, record in pairs_of])


def _tell(console: Console, as_json: bool, text: str) -> None:
    if not as_json:
        say(console, text)


def _by_hand(judged: Cleaning, wanted: dict[Verdict, Sequence[str] | None]) -> dict[str, Verdict]:
    """Verdicts by file name, from names and patterns; the last option that names a picture exactly wins.

    Raises:
        UsageError: a pattern without a picture.
    """
    names = [each.record.file_name for each in judged.judged]
    found: dict[str, Verdict] = {}
    exact: dict[str, Verdict] = {}
    wrong = []
    for verdict, patterns in wanted.items():
        for pattern in patterns or ():
            hits = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
            if not hits:
                wrong.append(f"--{verdict} {pattern!r} names no picture of this folder")
            target = exact if hits == [pattern] else found
            target |= dict.fromkeys(hits, verdict)
    if wrong:
        raise UsageError("These pictures are not there:", wrong)
    return found | exact


def _reset(console: Console, judged: Cleaning, write: bool) -> None:
    if not write:
        say(console, "Would take every verdict out of metadata.jsonl; add --write to do it.")
        return
    judged.scan.raise_for_errors()
    path = cleaning_of.reset(judged.scan.folder, [each.record for each in judged.judged])
    say(console, f"Took the verdicts out of {shown(str(path))}.")


def _print(console: Console, judged: Cleaning) -> None:
    found = Counter(finding.check for each in judged.judged for finding in each.findings)
    checks = [
        (
            name,
            "" if name == "copy" else f"{rule.limit:g}",
            rule.verdict,
            "off" if rule.verdict == "keep" else str(found[name]),
            rule.meaning,
        )
        for name, rule in judged.rules.items()
    ]
    print_table(console, "checks", ("check", "limit", "leads to", "pictures", "what is measured"), checks)
    told = [each.record for each in judged.judged if each.record.verdict != "keep" or each.by_hand]
    rows = [
        (record.file_name, record.verdict, BETWEEN.join(record.verdict_reasons))
        for record in sorted(told, key=lambda record: record.verdict != "drop")
    ]
    more = "; `finetune data report` shows them all, with thumbnails"
    title = "verdicts other than keep, or by hand"
    print_table(console, title, ("file", "verdict", "why"), rows, SHOWN_ROWS, more)
    counts = judged.counts()
    hand = sum(each.by_hand for each in judged.judged)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("keep", "review", "drop"))
    by_hand = f"; {hand} of these by hand" if hand else ""
    say(console, f"{counted(len(judged.judged), 'picture')}: {verdicts}{by_hand}.")


def to_json(judged: Cleaning) -> dict[str, Any]:
    """Everything the command found, for other programs."""
    return {
        "folder": judged.scan.folder.name,
        "counts": {name: judged.counts()[name] for name in ("keep", "review", "drop")},
        "rules": {name: asdict(rule) for name, rule in judged.rules.items()},
        "pictures": [picture_json(each) for each in judged.judged],
        "problems": [asdict(problem) for problem in judged.scan.problems],
    }


def picture_json(each: Judged) -> dict[str, Any]:
    """One picture's verdict and numbers."""
    return {
        "file_name": each.record.file_name,
        "verdict": each.record.verdict,
        "by_hand": each.by_hand,
        "reasons": list(each.record.verdict_reasons),
        "findings": [asdict(finding) for finding in each.findings],
        "sharpness": each.measures.sharpness,
        "luma_low": each.measures.luma_low,
        "luma_high": each.measures.luma_high,
        "bars": each.measures.bars,
        "scores": dict(each.scores),
    }
