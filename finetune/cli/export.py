"""Commands that write adapters for other programs and publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune.cli.app import app
from finetune.console import ConsoleReporter
from finetune.run_files import change_run, load_run


@app.command()
def export(  # noqa: PLR0913, PLR0917 - what the user chooses
    run_folder: Annotated[Path, typer.Argument(help="A run folder with a finished adapter.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="diffusers, kohya (ComfyUI, A1111, Forge, InvokeAI), peft, merged (a folder), single-file (a "
            "checkpoint) or embeddings (learned words); repeatable. Default: the run's own.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to; default: exports in the run folder.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; default: the run's own.")] = "",
    force: Annotated[
        bool, typer.Option(help="Keep a merged model although rounding takes much of the adapter.")
    ] = False,
    checkpoint: Annotated[
        str, typer.Option(help="A step that is still there, best or last; default: the finished adapter.")
    ] = "",
    allow_lossy: Annotated[
        bool, typer.Option(help="Write a LoRA where a format cannot say what the adapter does; the loss is measured.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="With --allow-lossy: the rank of that LoRA.")] = 64,
    metadata: Annotated[str, typer.Option(help="minimal, public or full; default: the run's own.")] = "",
    install: Annotated[
        str, typer.Option(help="Copy the files to where a program reads them: comfyui:FOLDER or a1111:FOLDER.")
    ] = "",
) -> None:
    """Write the adapter in the layouts other programs load; each file is read back and compared before it counts."""
    reporter = ConsoleReporter()
    run = load_run(run_folder)
    changes = [f"export.formats=[{', '.join(formats)}]"] if formats else []
    changes += [f"export.dtype={dtype}"] if dtype else []
    run = change_run(run, [*changes, *([f"export.metadata={metadata}"] if metadata else [])])
    source = finetune.checkpoint_adapter(run_folder, checkpoint) if checkpoint else None
    exported = finetune.export_run(
        run_folder, run, output or run_folder / "exports", reporter, force=force, source=source,
        lossy=rank if allow_lossy else None,
    )  # fmt: skip
    rows = finetune.exported_rows(exported)
    if install:
        copied = finetune.install_files(install, {item.format: item.path for item in exported})
        rows += [("installed", str(path)) for path in copied]
    reporter.table("Exported and read back", rows)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `finetune build` made: files, model card and manifest.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is missing.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and send nothing.")] = False,
    public: Annotated[bool, typer.Option(help="Let everybody see a new repository; default: private.")] = False,
) -> None:
    """Publish a built adapter on the Hugging Face hub; every file is looked through for private words before."""
    reporter = ConsoleReporter()
    sent = finetune.push_folder(folder, repository, dry_run=dry_run, public=public)
    reporter.table("Would be sent" if dry_run else "Sent", sent.rows())
