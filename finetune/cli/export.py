"""Commands that write adapters for other programs and publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

import finetune
from finetune import before
from finetune.cli.app import app
from finetune.cli.options import choice
from finetune.config.export import Format, NumberFormat, Openness
from finetune.console import ConsoleReporter
from finetune.run_files import change_run, load_run_folder


@app.command()
def export(  # noqa: PLR0913, PLR0917 - what the user chooses
    run_folder: Annotated[Path, typer.Argument(help="A run folder with a finished adapter.")],
    formats: Annotated[
        list[str] | None,
        choice(
            "export format (--format)",
            get_args(Format),
            "--format",
            "-f",
            metavar="FORMAT",
            help="kohya (ComfyUI, A1111, Forge, InvokeAI), diffusers, peft; with the base in it: merged (a folder) or "
            "single-file (a checkpoint); embeddings (learned words). Repeatable. Default: the run's own.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to. Default: exports in the run folder, a folder per STEP in it."),
    ] = None,
    dtype: Annotated[
        str | None, choice("number format (--dtype)", get_args(NumberFormat), help="Default: the run's own.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep a merged model although rounding takes much of the adapter.")
    ] = False,
    checkpoint: Annotated[
        str,
        typer.Option(metavar="STEP|best|last", help="A checkpoint instead of the finished adapter."),
    ] = "",
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy", help="Write a LoRA where a format cannot say what the adapter does; the loss is measured."
        ),
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="With --allow-lossy: the rank of that LoRA.")] = 64,
    metadata: Annotated[
        str | None,
        choice("openness (--metadata)", get_args(Openness), help="What files say of the run. Default: the run's own."),
    ] = None,
    install: Annotated[
        str,
        typer.Option(metavar="comfyui:FOLDER|a1111:FOLDER", help="Also copy the files to where it reads them."),
    ] = "",
) -> None:
    """Write the adapter in the layouts other programs load; each file is read back and compared before it counts.

    `finetune train` does this at its end; this is for other formats, other checkpoints, or a copy into a program.

    Examples:

      finetune export runs/mine -f kohya --install comfyui:~/ComfyUI

      finetune export runs/mine -f single-file -o models --dtype fp16

      finetune export runs/mine --checkpoint best
    """
    reporter = ConsoleReporter()
    run = load_run_folder(run_folder)
    changes = [f"export.formats=[{', '.join(formats)}]"] if formats else []
    changes += [f"export.dtype={dtype}"] if dtype else []
    run = change_run(run, [*changes, *([f"export.metadata={metadata}"] if metadata else [])])
    before.exporting(run_folder, run, checkpoint)
    source = finetune.checkpoint_adapter(run_folder, checkpoint) if checkpoint else None
    exported = finetune.export_run(
        run_folder, run, output, reporter, force=force, source=source, lossy=rank if allow_lossy else None,
        program=install,
    )  # fmt: skip
    reporter.table("Exported and read back", finetune.exported_rows(exported))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `finetune build` made: files, model card and manifest.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is missing.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and send nothing.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a new repository.")] = False,
) -> None:
    """Publish a built adapter on the Hugging Face hub; every file is looked through for private words before.

    Log in first with `hf auth login`.

    Example: finetune push dist OWNER/NAME --dry-run
    """
    reporter = ConsoleReporter()
    sent = finetune.push_folder(folder, repository, dry_run=dry_run, public=public)
    reporter.table("Would be sent" if dry_run else "Sent", sent.rows())
