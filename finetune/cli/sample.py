"""Command that draws pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

import finetune
from finetune.cli.app import app
from finetune.console import ConsoleReporter
from finetune.errors import ConfigError
from finetune.prompt_lines import read_prompts
from finetune.run_files import checked
from finetune.weighted import parse_weighted

Value = TypeVar("Value")
START, ADAPTERS, LOOK, STEER = "What to draw with", "Adapters", "The picture", "Pictures that steer"

PromptsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="What to draw; (word:1.3) says a word louder. For one prompt only: a house --w 768 --h 512 --s 30 "
        "--l 5 --d 7 --n blurry.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str, typer.Option(help="demo, a folder, a .safetensors or a hub id; default: the run's.", rich_help_panel=START)
]
RunOption = Annotated[Path | None, typer.Option(help="A run folder: its base and its adapter.", rich_help_panel=START)]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="FILE[@STRENGTH]",
        rich_help_panel=ADAPTERS,
        help="An adapter of any layout, at a strength: cat.safetensors@0.8. Repeatable; they add up.",
    ),
]
StrengthsOption = Annotated[
    str, typer.Option(metavar="0,0.5,1", help="One row of pictures per factor.", rich_help_panel=ADAPTERS)
]
RefinerOption = Annotated[
    str,
    typer.Option(
        metavar="BASE[@0.8]",
        rich_help_panel=START,
        help="A second base that draws from this share of the schedule on (SDXL's refiner).",
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")]
PromptsFileOption = Annotated[Path | None, typer.Option("--prompts", help="A text file with one prompt per line.")]
NegativeOption = Annotated[str, typer.Option(help="What to steer away from.", rich_help_panel=LOOK)]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the first picture of each prompt.", rich_help_panel=LOOK)]
CountOption = Annotated[int, typer.Option("--count", "-n", help="Pictures per prompt.", rich_help_panel=LOOK)]
StepsOption = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=LOOK)]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="How closely to follow; default: 7.5, Flux 3.5.", rich_help_panel=LOOK)
]
WidthOption = Annotated[int | None, typer.Option(help="Pixels; default: the base's.", rich_help_panel=LOOK)]
HeightOption = Annotated[int | None, typer.Option(help="Pixels; default: the base's.", rich_help_panel=LOOK)]
SchedulerOption = Annotated[
    str | None, typer.Option(help="euler_a, dpm++_2m_karras, ...; default: the base's.", rich_help_panel=LOOK)
]
ClipSkipOption = Annotated[
    int | None, typer.Option(help="Which CLIP layer is read, from the end: 1 or 2.", rich_help_panel=LOOK)
]
ChunksOption = Annotated[
    int, typer.Option(help="How many times 75 tokens of a prompt are read.", rich_help_panel=LOOK)
]
UpscaleOption = Annotated[
    float | None, typer.Option(help="Draw again this much larger, from the first picture.", rich_help_panel=LOOK)
]
ImageOption = Annotated[Path | None, typer.Option(help="A picture to change.", rich_help_panel=STEER)]
StrengthOption = Annotated[
    float | None, typer.Option(help="How much of it to change, 0 to 1; default: 0.6.", rich_help_panel=STEER)
]
MaskOption = Annotated[Path | None, typer.Option(help="White is repainted, black kept.", rich_help_panel=STEER)]
ControlnetOption = Annotated[str | None, typer.Option(help="Folder or hub id.", rich_help_panel=STEER)]
ControlOption = Annotated[
    str,
    typer.Option(
        metavar="[canny:]PICTURE", rich_help_panel=STEER, help="What the ControlNet sees; canny: draws its edges first."
    ),
]
ControlScaleOption = Annotated[
    float | None,
    typer.Option(help="How closely the control picture is kept; default: 1.", rich_help_panel=STEER),
]
DtypeOption = Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto.")]
BatchOption = Annotated[int, typer.Option(help="Pictures at once; more is faster and takes more memory.")]
LowMemoryOption = Annotated[bool, typer.Option("--low-memory", help="Decode in tiles; text encoders only visit.")]
AgainOption = Annotated[
    Path | None, typer.Option("--from", metavar="PNG", help="Make this picture again, from what it says.")
]


NOT_AGAIN = {
    "prompts", "prompts_file", "negative", "seed", "count", "steps", "guidance", "width", "height", "scheduler",
    "clip_skip", "chunks", "upscale", "strength", "strengths", "control_scale", "dtype", "batch",
}  # fmt: skip
"""What a picture's own papers say, so that nothing else can be said beside --from."""


@app.command()
def sample(  # noqa: PLR0913, PLR0917 - what the user chooses, one option each
    context: typer.Context,
    prompts: PromptsArgument = None,
    base: BaseOption = "",
    run: RunOption = None,
    refiner: RefinerOption = "",
    adapter: AdapterOption = None,
    strengths: StrengthsOption = "",
    output: OutputOption = Path("samples"),
    prompts_file: PromptsFileOption = None,
    negative: NegativeOption = "",
    seed: SeedOption = 0,
    count: CountOption = 1,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    width: WidthOption = None,
    height: HeightOption = None,
    scheduler: SchedulerOption = None,
    clip_skip: ClipSkipOption = None,
    chunks: ChunksOption = 1,
    upscale: UpscaleOption = None,
    image: ImageOption = None,
    strength: StrengthOption = None,
    mask: MaskOption = None,
    controlnet: ControlnetOption = None,
    control: ControlOption = "",
    control_scale: ControlScaleOption = None,
    dtype: DtypeOption = "",
    batch: BatchOption = 1,
    low_memory: LowMemoryOption = False,
    again: AgainOption = None,
) -> None:
    """Draw pictures with a base model and adapters; each PNG says how it was made.

    Examples:

      finetune sample "a photo of sks dog in the snow" --run runs/mine -n 4

      finetune sample "a red house" --base sd15.safetensors -a style.safetensors@0.7 --strengths 0,0.5,1

      finetune sample --from samples/a-red-house-s0-1a2b3c4d.png
    """
    if again is not None:
        _check_alone(context, adapter or ())
    reporter = ConsoleReporter()
    model, own, merged = finetune.model_of(base, run)
    chosen = {"dtype": dtype or None, "clip_skip": clip_skip, "prompt_chunks": chunks if chunks != 1 else None}
    problems: tuple[str, ...] = ()
    try:
        model = checked(type(model), model.model_dump() | _said(chosen))
    except ConfigError as error:
        problems = error.problems
    adapters = [(path, 1.0) for path in own] + [parse_weighted(text) for text in adapter or ()]
    preparation, shown = _control(control)
    second = parse_weighted(refiner, 0.8) if refiner else None
    if again is not None:
        shot = finetune.shot_of(again)
        if not base and run is None:
            model = model.model_copy(update={"base": shot.base})
        pictures = _said({"image": image, "mask": mask, "control": shown})
        networks = _said({"controlnet": controlnet, "refiner": str(second[0]) if second else None})
        files = [path for path, _ in adapters]
        copy = finetune.sample_again(shot, model, files, pictures, output, reporter, networks, merged)
        reporter.table("Done", [("Picture", str(copy))])
        return
    wanted = finetune.Wanted(
        prompts=(*(prompts or ()), *(read_prompts(prompts_file) if prompts_file else ())),
        negative_prompt=negative, seed=seed, count=count,
        steps=steps, guidance_scale=guidance, width=width, height=height, scheduler=scheduler,
        adapters=tuple(adapters), strengths=_numbers(strengths), image=image, mask=mask, control=shown,
        strength=strength, controlnet=controlnet, control_scale=control_scale, control_from=preparation,
        refiner=(str(second[0]), second[1]) if second else None, upscale=upscale, batch_size=batch,
        low_memory=low_memory, merge_first=merged,
    )  # fmt: skip
    if problems:
        raise ConfigError("No picture can be made:", [*problems, *wanted.problems()])
    made = finetune.sample(model, wanted, output, reporter)
    sheet = [("Sheet", str(output / "sheet.png"))] if len(made) > 1 else []
    reporter.table("Done", [*(("Picture", str(path)) for path in made[:12]), *sheet])


def _said(options: Mapping[str, Value | None]) -> dict[str, Value]:
    """What the user has chosen of these."""
    return {name: value for name, value in options.items() if value is not None}


def _check_alone(context: typer.Context, adapters: Sequence[str]) -> None:
    """Refuse what would have to be dropped, because a picture is made again as it was."""
    named = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in sorted(NOT_AGAIN)}
    given = [named[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    given += [f"the strength of {text}" for text in adapters if "@" in text and not Path(text).exists()]
    if given:
        raise ConfigError(
            f"--from makes a picture again as it was, so {', '.join(given)} cannot be chosen beside it.",
            ["leave them out, or leave --from out and say all of it"],
        )


def _control(text: str) -> tuple[str | None, Path | None]:
    """ "canny:photo.jpg" as what prepares the picture, and the picture; a file of that very name wins."""
    preparation, colon, name = text.partition(":")
    if not text or not colon or Path(text).exists():
        return None, Path(text) if text else None
    return preparation, Path(name)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part, f"--strengths {text}") for part in text.split(",")) if text else (1.0,)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) <= 100:
        raise ConfigError(f"{where} has {text.strip()!r} where a number belongs, such as 0.8.")
    return value
