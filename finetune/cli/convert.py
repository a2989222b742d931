"""Commands that rewrite one adapter: convert, resize; and extract, which makes one from two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune.cli.app import app, base_path
from finetune.console import ConsoleReporter

Adapter = Annotated[Path, typer.Argument(help="A .safetensors file, a PEFT folder, or a run's folder.")]
Target = Annotated[Path, typer.Argument(help="The new .safetensors file; a folder for --to peft.")]
Layout = Annotated[
    str, typer.Option(help="kohya (A1111, Forge, ComfyUI, InvokeAI, sd-scripts), diffusers, peft or ours.")
]
Base = Annotated[
    Path | None,
    typer.Option(
        help="Pipeline folder of its base, if that is of no published size.", parser=base_path, metavar="PATH"
    ),
]
Dtype = Annotated[str, typer.Option(help="fp32, fp16 or bf16; default: as in the source.")]


@app.command()
def convert(
    source: Adapter,
    target: Target,
    to: Layout,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Its base: a folder if of no published size; any, to measure what --allow-lossy loses.",
            parser=base_path,
            metavar="PATH",
        ),
    ] = None,
    dtype: Dtype = "",
    allow_lossy: Annotated[
        bool, typer.Option(help="Write what the layout cannot say exactly too; the loss is measured and noted.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Of the LoRA that then stands in for another method.")] = 64,
) -> None:
    """Put an adapter of any make into another layout, exactly or not at all; the new file is read back and compared."""
    reporter = ConsoleReporter()
    done = finetune.convert_adapter(
        source, target, to=to, dtype=dtype, base=base, allow_lossy=allow_lossy, rank=rank, reporter=reporter
    )
    reporter.table("Converted", done.rows())


@app.command()
def resize(  # noqa: PLR0913, PLR0917 - what the user chooses
    source: Adapter,
    target: Target,
    rank: Annotated[int, typer.Option(help="The rank; with a share below: the largest rank.")] = 0,
    energy: Annotated[float, typer.Option(help="Share of the squared singular values to keep, per layer: 0.95.")] = 0.0,
    frobenius: Annotated[float, typer.Option(help="Share of the Frobenius norm to keep, per layer: 0.95.")] = 0.0,
    ratio: Annotated[float, typer.Option(help="Keep singular values of at least 1/RATIO of the largest: 10.")] = 0.0,
    to: Layout = "kohya",
    base: Base = None,
    dtype: Dtype = "",
) -> None:
    """Give an adapter another rank: --rank 16, or as much as a share of each layer needs, such as --energy 0.95."""
    reporter = ConsoleReporter()
    shares = {"energy": energy, "frobenius": frobenius, "ratio": ratio}
    resized, written = finetune.resize_adapter(
        source, target, rank=rank, shares=shares, to=to, dtype=dtype, base=base, reporter=reporter
    )
    reporter.table("Resized", [*resized.rows(), *written.rows()])


@app.command()
def extract(  # noqa: PLR0913, PLR0917 - what the user chooses
    tuned: Annotated[Path, typer.Argument(help="The trained model: a pipeline folder or a single .safetensors file.")],
    original: Annotated[
        Path, typer.Argument(help="The model it was trained from.", parser=base_path, metavar="ORIGINAL")
    ],
    target: Target,
    rank: Annotated[int, typer.Option(help="The rank; with a share below: the largest rank.")] = 64,
    energy: Annotated[float, typer.Option(help="Share of the squared singular values to keep, per layer: 0.95.")] = 0.0,
    frobenius: Annotated[float, typer.Option(help="Share of the Frobenius norm to keep, per layer: 0.95.")] = 0.0,
    network: Annotated[
        list[str] | None, typer.Option(help="unet, text_encoder, ...; repeatable. Default: all.")
    ] = None,
    convolutions: Annotated[bool, typer.Option(help="Take 3x3 convolutions too.")] = True,
    to: Layout = "kohya",
    base: Base = None,
    dtype: Dtype = "",
) -> None:
    """Get an adapter out of a fine-tuned model: the best LoRA for the difference to its base, and what it keeps."""
    reporter = ConsoleReporter()
    shares = {"energy": energy, "frobenius": frobenius}
    extracted, written = finetune.extract_adapter(
        tuned, original, target, rank=rank, shares=shares, components=tuple(network or ()), convolutions=convolutions,
        to=to, dtype=dtype, base=base, reporter=reporter,
    )  # fmt: skip
    reporter.table("Extracted", [*extracted.rows(), *written.rows()])
