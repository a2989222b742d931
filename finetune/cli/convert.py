"""Commands that rewrite one adapter: convert, resize; and extract, which makes one from two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune import early_checks
from finetune.cli.app import app, base_path
from finetune.cli.options import choice
from finetune.console import ConsoleReporter
from finetune.interchange import choices

READ = "A .safetensors file of any layout, a PEFT folder, or a run folder."
SHARE = {"rich_help_panel": "How much to keep (choose one)"}
WRITTEN = {"rich_help_panel": "The new file"}

Adapter = Annotated[Path, typer.Argument(help=READ)]
Target = Annotated[Path, typer.Argument(help="The new .safetensors file; a folder for --to peft.")]
Layout = Annotated[
    str,
    choice(
        "layout (--to)",
        choices.LAYOUTS,
        help="kohya: for A1111, Forge, ComfyUI, InvokeAI and sd-scripts; ours: for this toolkit.",
        **WRITTEN,
    ),
]
Dtype = Annotated[
    str | None,
    choice("number format (--dtype)", choices.NUMBER_FORMATS, help="Default: as in the source.", **WRITTEN),
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=base_path,
        help="Diffusers folder of the base, needed if that is not a published model; demo: the embedded base.",
    ),
]
Energy = Annotated[
    float | None, typer.Option(help="Share of the squared singular values to keep, per layer: 0.95.", **SHARE)
]
Frobenius = Annotated[
    float | None, typer.Option(help="Share of the Frobenius norm to keep, per layer: 0.95.", **SHARE)
]


@app.command()
def convert(
    source: Adapter,
    target: Target,
    to: Layout,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=base_path,
            help="Its base: a diffusers folder if that is not a published model; a folder or file to measure what "
            "--allow-lossy loses.",
        ),
    ] = None,
    dtype: Dtype = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Approximate what the layout cannot express; the loss is measured.")
    ] = False,
    rank: Annotated[
        int, typer.Option(min=1, help="With --allow-lossy: rank of the LoRA that replaces other methods.")
    ] = 64,
) -> None:
    """Convert an adapter to another layout, exactly or not at all; the new file is read back and compared.

    Reads files of kohya, LyCORIS, diffusers (old and new), PEFT, OneTrainer, ai-toolkit and SimpleTuner.

    Examples:

      finetune convert from-civitai.safetensors mine.safetensors --to diffusers

      finetune convert dora.safetensors lora.safetensors --to kohya --allow-lossy --base sd15.safetensors
    """
    choices.check_output(target, to, dtype or "", [source])
    early_checks.files([source])
    reporter = ConsoleReporter()
    done = finetune.convert_adapter(
        source, target, to=to, dtype=dtype or "", base=base, allow_lossy=allow_lossy, rank=rank, reporter=reporter
    )
    reporter.table("Converted", done.rows())


@app.command()
def resize(  # noqa: PLR0913, PLR0917 - what the user chooses
    source: Adapter,
    target: Target,
    rank: Annotated[int | None, typer.Option(help="The rank; with another of these, the largest.", **SHARE)] = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep singular values of at least 1/RATIO of the largest: 10.", **SHARE)
    ] = None,
    to: Layout = "kohya",
    base: Base = None,
    dtype: Dtype = None,
) -> None:
    """Reduce the rank of an adapter: a smaller file that does nearly the same.

    Each layer keeps its largest singular values; the share of the change that they hold is measured.

    Examples:

      finetune resize big.safetensors small.safetensors --rank 16

      finetune resize big.safetensors small.safetensors --energy 0.95
    """
    shares = {"energy": energy, "frobenius": frobenius, "ratio": ratio}
    choices.check_rank(rank, shares)
    choices.check_output(target, to, dtype or "", [source])
    early_checks.files([source])
    reporter = ConsoleReporter()
    resized, written = finetune.resize_adapter(
        source, target, rank=rank, shares=shares, to=to, dtype=dtype or "", base=base, reporter=reporter
    )
    reporter.table("Resized", [*resized.rows(), *written.rows()])


@app.command()
def extract(  # noqa: PLR0913, PLR0917 - what the user chooses
    tuned: Annotated[Path, typer.Argument(help="The trained model: a diffusers folder or a .safetensors file.")],
    original: Annotated[
        Path,
        typer.Argument(metavar="ORIGINAL", parser=base_path, help="The model it was trained from, of the same kind."),
    ],
    target: Target,
    rank: Annotated[int, typer.Option(help="The rank; with another of these, the largest.", **SHARE)] = 64,
    energy: Energy = None,
    frobenius: Frobenius = None,
    network: Annotated[
        list[str] | None,
        typer.Option(help="Only this network: unet, transformer, text_encoder, ... Repeatable. Default: all."),
    ] = None,
    convolutions: Annotated[bool, typer.Option(help="Include 3x3 convolutions.")] = True,
    to: Layout = "kohya",
    base: Base = None,
    dtype: Annotated[
        str, choice("number format (--dtype)", choices.NUMBER_FORMATS, help="Number format of the new file.", **WRITTEN)
    ] = "fp16",
) -> None:
    """Extract a LoRA from a fine-tuned model: the best approximation of its difference from the base.

    Both models may be folders or single files.

    Examples:

      finetune extract tuned.safetensors sd15.safetensors lora.safetensors --rank 64

      finetune extract tuned/ base/ lora.safetensors --energy 0.98 --network unet
    """
    shares = {"energy": energy, "frobenius": frobenius}
    choices.check_rank(rank, shares)
    choices.check_output(target, to, dtype or "", [tuned, original])
    early_checks.models([tuned, original])
    reporter = ConsoleReporter()
    extracted, written = finetune.extract_adapter(
        tuned, original, target, rank=rank, shares=shares, components=tuple(network or ()), convolutions=convolutions,
        to=to, dtype=dtype, base=base, reporter=reporter,
    )  # fmt: skip
    reporter.table("Extracted", [*extracted.rows(), *written.rows()])
