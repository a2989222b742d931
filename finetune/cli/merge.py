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
from finetune.cli.app import app, base_path
from finetune.cli.convert import Base, Dtype, Layout
from finetune.console import ConsoleReporter
from finetune.errors import ConfigError


@app.command()
def merge(  # noqa: PLR0913, PLR0917 - what the user chooses
    adapters: Annotated[list[str], typer.Argument(help="Files of any layout, with their weights: cat.safetensors@0.8")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new file; with --into a folder for a folder.")],
    how: Annotated[
        str,
        typer.Option(
            help="concat: the exact sum, ranks add up. svd: its best approximation at --rank. linear: adds factors, "
            "for checkpoints of one run. ties, dare: sums of what agrees, or of a random share."
        ),
    ] = "concat",
    into: Annotated[
        Path | None,
        typer.Option(
            help="Add them into this base: a pipeline folder or a single file.", parser=base_path, metavar="PATH"
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the result of svd, ties and dare; default: the largest.")] = 0,
    density: Annotated[float, typer.Option(help="Share of values that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the values that dare drops.")] = 0,
    to: Layout = "kohya",
    base: Base = None,
    dtype: Dtype = "",
    force: Annotated[bool, typer.Option(help="With --into: keep it although rounding takes much.")] = False,
) -> None:
    """Make one adapter of several, or put them into a base model for good."""
    reporter = ConsoleReporter()
    settings = {"how": how, "rank": rank, "density": density, "seed": seed}
    if into:
        given = {"--to": to != "kohya", "--dtype": dtype, "--rank": rank}
        if unused := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"{' and '.join(unused)} would do nothing together with --into.",
                ["the result is a model in the base's own layout and number format; leave them out."],
            )
        done = finetune.merge_into_base(
            adapters, into, output, settings=settings, force=force, base=base, reporter=reporter
        )
        reporter.table("Merged", done.rows())
        return
    merged, written = finetune.merge_adapters(
        adapters, output, settings=settings, to=to, dtype=dtype, base=base, reporter=reporter
    )
    exact = ("Against the exact sum", f"{merged.distance:.2%} away" if merged.distance > 1e-5 else "the same")
    reporter.table("Merged", [exact, *written.rows()])


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="An adapter of any layout.")],
    second: Annotated[Path, typer.Argument(help="Another one for the same kind of base.")],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare two adapters block by block: the angle between what they change, and which changes more."""
    found = finetune.diff_adapters(first, second, base)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    table = Table(title=Text(f"{second} against {first}"), title_justify="left", title_style="bold", box=None)
    for name, justify in (("network", "left"), ("block", "left"), ("cosine", "right"), ("norm ratio", "right"),
                          ("layers in both", "right"), ("only first", "right"), ("only second", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in found.blocks:
        counts = [str(count) for count in (row.both, row.only_first, row.only_second)]
        table.add_row(row.component, row.block, f"{row.cosine:+.4f}", f"{row.ratio:.4g}", *counts)
    table.add_row("all", "", f"{found.cosine:+.4f}", f"{found.ratio:.4g}", style="bold")
    ConsoleReporter().console.print(table)
