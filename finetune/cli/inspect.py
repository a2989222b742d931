"""Command that looks into adapter files, checkpoints and embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

import finetune
from data_tools.errors import counted
from finetune.cli.app import app, base_path
from finetune.console import ConsoleReporter

if TYPE_CHECKING:
    from finetune.interchange.inspection import Facts

BAR = 28
"""Characters of the longest bar, where there is room."""
OTHER_COLUMNS = 50
"""Characters that the columns beside the bar take."""
LISTED = 8
COLOURS = {"yes": "green", "partly": "yellow", "no": "red"}


@app.command(name="inspect")
def inspect_file(
    file: Annotated[Path, typer.Argument(help="A .safetensors file, a PEFT folder, or a run's folder.")],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=base_path,
            help="Diffusers folder of its base, if that is not a published model; demo: the embedded base.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    hashes: Annotated[bool, typer.Option("--hashes", help="Also hash files above 1 GB.")] = False,
    norms: Annotated[bool, typer.Option(help="Measure how much each block is changed.")] = True,
) -> None:
    """Show what a file holds: layout, method, ranks, strength per block, trigger words, and which programs load it.

    For adapters from any trainer, checkpoints and embeddings; no code in the file is executed.

    Examples:

      finetune inspect cat.safetensors

      finetune inspect runs/mine --json
    """
    facts = finetune.inspect_file(file, base, hashes=hashes, norms=norms)
    if as_json:
        typer.echo(json.dumps(facts.as_dict(), indent=2, ensure_ascii=False))
        return
    console = ConsoleReporter().console
    console.print(_summary(facts))
    for table in (_coverage(facts), _strengths(facts, console.width), _loads_in(facts)):
        if table.row_count:
            console.print(table)
    for note in facts.notes:
        console.print(f"! {note}", markup=False, style="yellow")
    for name in facts.unknown[:LISTED] if facts.kind != "checkpoint" else ():
        console.print(f"  unknown: {name}", markup=False, style="yellow")


def _summary(facts: Facts) -> Table:
    table = _titled(facts.path)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    formats = ", ".join(f"{count} {name}" for name, count in facts.dtypes.items())
    rows = {
        "kind": f"{facts.kind}, {facts.layout} layout" if facts.kind == "adapter" else facts.kind,
        "for": " or ".join(facts.candidates) if facts.candidates else facts.base,
        "size": f"{facts.bytes:,} bytes, {facts.tensors} tensors ({formats}), {facts.parameters:,} parameters",
        **{f"method, {name}": _counts(counts) for name, counts in facts.methods.items()},
        **{f"rank, {name}": _counts(counts) for name, counts in facts.ranks.items()},
        **{f"alpha / rank, {name}": _counts(counts) for name, counts in facts.scales.items()},
        "learned words": ", ".join(
            f"{word} ({', '.join(f'{network} {shape}' for network, shape in vectors.items())})"
            for word, vectors in facts.tokens.items()
        ),
        "trigger words": ", ".join(facts.trigger_words),
        "frequent tags": ", ".join(f"{tag} ({count})" for tag, count in facts.tags),
        **facts.training,
        **facts.hashes,
    }
    for label, value in rows.items():
        if value:
            table.add_row(label, Text(value))
    return table


def _coverage(facts: Facts) -> Table:
    table = _titled("Layers changed")
    for style in ("cyan", "", "", "dim"):
        table.add_column(style=style, overflow="fold")
    for row in facts.coverage:
        missed = ", ".join(row.missed[:3]) + (f" and {len(row.missed) - 3} more" if len(row.missed) > 3 else "")
        table.add_row(row.component, row.kind, f"{row.hit} of {row.total}", Text(f"not {missed}" if missed else ""))
    return table


def _strengths(facts: Facts, width: int) -> Table:
    """`width` is the console's, in characters: the bars take what the other columns leave."""
    table = _titled("Change per block (Frobenius norm; root mean square per weight)")
    for style, justify in (("cyan", "left"), ("", "left"), ("green", "left"), ("", "right"), ("dim", "right")):
        table.add_column(style=style, justify=justify, overflow="fold")  # type: ignore[arg-type]
    bar_length = max(4, min(BAR, width - OTHER_COLUMNS))
    longest = max((row.norm for row in facts.strengths), default=0.0) or 1.0
    for row in facts.strengths:
        bar = "█" * max(1, round(bar_length * row.norm / longest)) if row.norm else "·"
        table.add_row(row.component, row.block, bar, f"{row.norm:.4g}", f"{row.rms:.2e}")
    return table


def _loads_in(facts: Facts) -> Table:
    table = _titled("Loads in")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for reader, verdict in facts.loads_in.items():
        table.add_row(reader, Text(verdict.verdict, style=COLOURS[verdict.verdict]), Text(verdict.reason))
    return table


def _titled(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", show_header=False, box=None)


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    more = f" and {counted(len(ordered) - LISTED, 'more value')}" if len(ordered) > LISTED else ""
    return ", ".join(f"{value} ({count})" if len(ordered) > 1 else value for value, count in ordered[:LISTED]) + more
