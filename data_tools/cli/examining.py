"""What `clean` and `report` share: their arguments, and settings given as name=value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import ImageColor

from data_tools.clean import Cleaning, Options
from data_tools.cli.printing import stages
from data_tools.errors import UsageError, shown, stop_for_errors
from data_tools.images import Color
from data_tools.processes import this_process
from data_tools.rules import RULES, Rule, change_rules
from data_tools.scoring import SCORERS, ScorerSpec

Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="CHECK=NUMBER",
        help=f"Change the limit of a check, such as blur=40; repeatable. Checks: {', '.join(RULES)}.",
    ),
]
Verdicts = Annotated[
    list[str] | None,
    typer.Option(
        "--verdict",
        metavar="CHECK=VERDICT",
        help="Change what a check leads to: drop, review, or keep, which turns it off. Such as near_copy=drop.",
    ),
]
Against = Annotated[
    list[Path] | None,
    typer.Option(help="A folder whose pictures must not be in this one, such as the validation set; repeatable."),
]


def settings(
    limits: Sequence[str] | None, verdicts: Sequence[str] | None, scorers: Sequence[ScorerSpec] = ()
) -> dict[str, Rule]:
    """The rules as changed on the command line, those of scorers among them.

    Raises:
        UsageError: an option that is no name=value, or names no check, number or verdict.
    """
    wrong = []
    numbers: dict[str, float] = {}
    for name, text in pairs("--limit", limits):
        try:
            numbers[name] = float(text)
        except ValueError:
            wrong.append(f"--limit {name}={text}: {text!r} is no number")
    if wrong:
        raise UsageError("These limits cannot be followed:", wrong)
    rules = {**RULES, **{spec.name: spec.rule for spec in (*SCORERS.values(), *scorers)}}
    return change_rules(numbers, dict(pairs("--verdict", verdicts)), rules)


def pairs(option: str, texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """name=value options, split.

    Raises:
        UsageError: one without an equals sign.
    """
    split = [text.partition("=") for text in texts or ()]
    wrong = [name for name, equals, _ in split if not equals]
    if wrong:
        raise UsageError(f"{option} {wrong[0]!r} holds no '='; write {option} name=value.")
    return [(name.strip(), value.strip()) for name, _, value in split]


def color(text: str) -> Color:
    """Red, green, blue of a colour's name or #rrggbb.

    Raises:
        UsageError: no colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f"--background {text!r} is no colour; write white, black or #rrggbb.") from error
    return red, green, blue


@contextmanager
def opened(
    folder: Path,
    rules: dict[str, Rule],
    *,
    captions: str,
    template: str | None,
    background: str,
    workers: int | None,
    against: Sequence[Path] | None,
) -> Iterator[Options]:
    """Everything that `examine` is asked, with which process this is and progress on standard error."""
    behind = color(background)
    share = this_process()
    with stages(share) as stage:
        yield Options(rules, captions, template, behind, workers, tuple(against or ()), share, stage)


def raise_for_broken(cleaning: Cleaning) -> None:
    """Stop for errors; a caption that is still missing is none for what is looked at here.

    Raises:
        DataToolsError: naming every error at once.
    """
    waiting = {record.file_name for record in cleaning.scan.uncaptioned}
    errors = [problem for problem in cleaning.scan.of("error") if problem.file_name not in waiting]
    stop_for_errors(f"{shown(str(cleaning.scan.folder))} holds files that cannot be used:", errors)
