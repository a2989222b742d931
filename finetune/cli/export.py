"""Commands that export adapters for other programs and publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

import finetune
from finetune import early_checks
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
        typer.Option("--output", "-o", help="Output folder. Default: exports/ (and step-N/ in it) in the run folder."),
    ] = None,
    dtype: Annotated[
        str | None, choice("number format (--dtype)", get_args(NumberFormat), help="Default: the run's own.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep a merged model even if rounding loses much of the adapter.")
    ] = False,
    checkpoint: Annotated[
        str,
        typer.Option(metavar="STEP|best|last", help="A checkpoint instead of the finished adapter."),
    ] = "",
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy",
            help="Approximate with a LoRA where a format cannot express the adapter; the loss is measured.",
        ),
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="With --allow-lossy: the rank of that LoRA.")] = 64,
    metadata: Annotated[
        str | None,
        choice("openness (--metadata)", get_args(Openness), help="How much files tell of the run. Default: its own."),
    ] = None,
    install: Annotated[
        str,
        typer.Option(metavar="comfyui:FOLDER|a1111:FOLDER", help="Also copy the files into this program's folders."),
    ] = "",
) -> None:
    """Export an adapter for other programs; each file is read back and compared with what was trained.

    `finetune train` exports at its end; use this for other formats or checkpoints, or to install into a program.

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
    early_checks.exporting(run_folder, run, checkpoint)
    source = finetune.checkpoint_adapter(run_folder, checkpoint) if checkpoint else None
    exported = finetune.export_run(
        run_folder, run, output, reporter, force=force, source=source, lossy=rank if allow_lossy else None,
        program=install,
    )  # fmt: skip
    reporter.table("Exported and read back", finetune.exported_rows(exported))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder made by `finetune build`: files, model card and manifest.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; created if it is missing.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded and stop.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
) -> None:
    """Publish a built adapter on the Hugging Face hub, after checking every file for private paths and tokens.

    Log in first with `hf auth login`.

    Example: finetune push dist OWNER/NAME --dry-run
    """
    reporter = ConsoleReporter()
    sent = finetune.push_folder(folder, repository, dry_run=dry_run, public=public)
    reporter.table("Would be uploaded" if dry_run else "Uploaded", sent.rows())
