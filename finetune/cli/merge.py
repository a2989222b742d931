"""Commands about several adapters: merge, diff."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

import finetune
from finetune import early_checks
from finetune.cli.app import app, base_path
from finetune.cli.convert import WRITTEN, Base, Layout
from finetune.cli.options import choice
from finetune.console import ConsoleReporter
from finetune.errors import ConfigError
from finetune.interchange import choices
from finetune.weighted import parse_weighted


@app.command()
def merge(  # noqa: PLR0913, PLR0917 - what the user chooses
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Files of any layout, with their weights: cat.safetensors@0.8."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new file; with --into a folder, the new folder.", **WRITTEN)
    ],
    how: Annotated[
        str,
        choice(
            "way of merging (--how)",
            choices.MERGE_METHODS,
            help="concat: the exact sum, ranks add up. svd: its best approximation at --rank. linear: sums of factors, "
            "for checkpoints of one run. ties: the sum of what agrees. dare: of a random share.",
        ),
    ] = "concat",
    into: Annotated[
        Path | None,
        typer.Option(
            help="Merge into this base model instead: a diffusers folder or a .safetensors file.",
            parser=base_path,
            metavar="PATH",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result of svd, ties and dare. Default: the adapters' largest.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of values that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses the values that dare drops.")] = 0,
    to: Layout = "kohya",
    base: Base = None,
    dtype: Annotated[
        str | None,
        choice(
            "number format (--dtype)",
            choices.NUMBER_FORMATS,
            help="Default: the widest of the adapters'; with --into the base's own.",
            **WRITTEN,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --into: keep the result even if rounding loses much of the change.")
    ] = False,
) -> None:
    """Merge several adapters into one, or into a base model.

    Weights follow an @; a negative weight subtracts. The result is read back and compared.

    Examples:

      finetune merge cat.safetensors@0.8 ink.safetensors -o both.safetensors

      finetune merge cat.safetensors --into sd15.safetensors -o sd15-cat.safetensors --dtype fp32
    """
    choices.check_merge(rank, density)
    paths = [parse_weighted(text)[0] for text in adapters]
    reporter = ConsoleReporter()
    settings = {"how": how, "rank": rank, "density": density, "seed": seed}
    if into:
        if unused := [name for name, given in {"--to": to != "kohya", "--rank": rank is not None}.items() if given]:
            raise ConfigError(
                f"{' and '.join(unused)} cannot be used with --into.",
                ["the result is a model in the base's own layout and has no rank; leave them out."],
            )
        early_checks.files(paths)
        early_checks.models([into])
        done = finetune.merge_into_base(
            adapters, into, output, settings=settings, dtype=dtype or "", force=force, base=base, reporter=reporter
        )
        reporter.table("Merged", done.rows())
        return
    choices.check_output(output, to, dtype or "", paths)
    early_checks.files(paths)
    merged, written = finetune.merge_adapters(
        adapters, output, settings=settings, to=to, dtype=dtype or "", base=base, reporter=reporter
    )
    exact = ("Against the exact sum", f"{merged.distance:.2%} away" if merged.distance > 1e-5 else "the same")
    reporter.table("Merged", [exact, *written.rows()])


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="An adapter of any layout.")],
    second: Annotated[Path, typer.Argument(help="Another one for the same kind of base.")],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare two adapters block by block: the angle between what they change, and which changes more.

    Cosine 1: the same direction, 0: unrelated. Norm ratio 2: the second changes twice as much.

    Example: finetune diff epoch-5.safetensors epoch-9.safetensors
    """
    early_checks.files([first, second])
    found = finetune.diff_adapters(first, second, base)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    table = Table(title=Text(f"{second} against {first}"), title_justify="left", title_style="bold", box=None)
    for name, justify in (("network", "left"), ("block", "left"), ("cosine", "right"), ("norm ratio", "right"),
                          ("layers in both", "right"), ("only first", "right"), ("only second", "right")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in found.blocks:
        counts = [str(count) for count in (row.both, row.only_first, row.only_second)]
        table.add_row(row.component, row.block, f"{row.cosine:+.4f}", f"{row.ratio:.4g}", *counts)
    table.add_row("all", "", f"{found.cosine:+.4f}", f"{found.ratio:.4g}", style="bold")
    reporter = ConsoleReporter()
    reporter.console.print(table)
    for note in found.notes:
        reporter.note(note)
