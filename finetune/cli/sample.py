"""Command that draws pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

import finetune
from finetune.cli.app import app
from finetune.cli.options import takes
from finetune.config import ModelConfig
from finetune.console import ConsoleReporter
from finetune.errors import ConfigError
from finetune.prompt_lines import read_prompts
from finetune.run_files import change_section, checked
from finetune.sampling.again import model_again, wanted_again
from finetune.sampling.papers import shot_of
from finetune.sampling.wanted import Wanted, check, model_of
from finetune.weighted import parse_weighted

Value = TypeVar("Value")
START = {"rich_help_panel": "What to draw with"}
LOOK = {"rich_help_panel": "The picture"}
STEER = {"rich_help_panel": "Pictures that steer"}
REFINER_START = 0.8


@dataclass(frozen=True)
class Asked:
    """What can be said on the command line; a field that `Wanted` or `ModelConfig` has too goes there as it is.

    To add an option: a field here and one of the same name in `Wanted`; if it decides what the picture looks like, one
    in `Shot` as well.
    """

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            show_default=False,
            help="What to draw; (word:1.3) says a word louder. Settings for one prompt only stand behind it: "
            '"a house --w 768 --h 512 --s 30 --l 5 --d 7 --n blurry".',
        ),
    ] = None
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with one prompt per line, as kohya's.")
    ] = None
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")] = Path("samples")
    again: Annotated[
        Path | None, typer.Option("--from", metavar="PNG", help="Make this picture again, from what it says.")
    ] = None

    base: Annotated[
        str,
        typer.Option(help="demo, a folder, a .safetensors or a hub id. Default: the run's, else demo.", **START),
    ] = ""
    of_base: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="model.FIELD=VALUE",
            help="What a recipe would say of the base: model.vae=FILE, model.text_encoders.text_encoder_2=FILE, "
            "model.skeleton=FOLDER, ... Repeatable.",
            **START,
        ),
    ] = None
    run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A run folder: its base and its adapter.", **START)
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[@STRENGTH]",
            help="An adapter of any layout, at a strength: cat.safetensors@0.8. Repeatable; they add up.",
            **START,
        ),
    ] = None
    factors: Annotated[
        str,
        typer.Option(
            "--strengths", metavar="0,0.5,1", help="One row of pictures per factor on all adapters.", **START
        ),
    ] = ""
    second_base: Annotated[
        str,
        typer.Option(
            "--refiner",
            metavar=f"BASE[@{REFINER_START}]",
            help="A second base, such as SDXL's refiner, that draws from this share of the steps on.",
            **START,
        ),
    ] = ""

    count: Annotated[int, typer.Option("--count", "-n", help="Pictures per prompt.", **LOOK)] = 1
    seed: Annotated[
        int, typer.Option(min=0, help="Of each prompt's first picture; the next ones count on.", **LOOK)
    ] = 0
    negative_prompt: Annotated[str, typer.Option("--negative", help="What to steer away from.", **LOOK)] = ""
    steps: Annotated[int, typer.Option(help="Denoising steps.", **LOOK)] = 25
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance", min=0, help="How closely to follow the prompt. Default: 7.5, Flux 3.5; 1 is off.", **LOOK
        ),
    ] = None
    width: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the base's own.", **LOOK)] = None
    height: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the base's own.", **LOOK)] = None
    scheduler: Annotated[
        str | None, typer.Option(help="euler_a, dpm++_2m_karras, ... Default: the base's own.", **LOOK)
    ] = None
    clip_skip: Annotated[
        int | None,
        typer.Option(help="CLIP layer that is read, from the end: 1 or 2. Default: the base's own.", **LOOK),
    ] = None
    prompt_chunks: Annotated[
        int | None, typer.Option("--chunks", help="How many times 75 tokens of a prompt are read. Default: 1.", **LOOK)
    ] = None
    upscale: Annotated[
        float | None,
        typer.Option(help="Draw it a second time this much larger, from the first picture: 1.5.", **LOOK),
    ] = None

    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture to change.", **STEER)] = None
    strength: Annotated[
        float | None, typer.Option(help="How much of --image to change, 0 to 1. Default: 0.6.", **STEER)
    ] = None
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="White is repainted, black is kept.", **STEER)
    ] = None
    controlnet: Annotated[
        str | None, typer.Option(help="A ControlNet: a folder, a .safetensors or a hub id.", **STEER)
    ] = None
    control_picture: Annotated[
        str,
        typer.Option(
            "--control",
            metavar="[canny:|depth:]FILE",
            help="What the ControlNet sees; canny: draws the picture's edges first, depth: how near everything is.",
            **STEER,
        ),
    ] = ""
    control_scale: Annotated[
        float | None, typer.Option(help="How closely the control picture is kept. Default: 1.", **STEER)
    ] = None
    depth_model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of what estimates depth. Default: Depth Anything V2 Small.", **STEER),
    ] = None

    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, fp16 or auto. Default: the run's, else auto: what the machine is fast in."),
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch", help="Pictures at once; more is faster and takes more memory.")
    ] = 1
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Take less memory, and longer: decode in tiles, park text encoders.")
    ] = False
    compile: Annotated[
        bool, typer.Option("--compile", help="For many pictures on a GPU: a minute of compiling, then faster steps.")
    ] = False


BESIDE_AGAIN = {
    "again", "output", "base", "of_base", "run", "adapter", "second_base", "image", "mask", "controlnet",
    "control_picture", "depth_model", "low_memory",
}  # fmt: skip
"""What can be said beside --from: where things lie. All else is in the picture's own papers."""
PARTS = ("vae", "text_encoders", "skeleton", "revision", "variant")
"""Fields of `ModelConfig` that say where parts of the base lie."""
READ_AS = ("prediction", "zero_terminal_snr", "t5_tokens")
"""Fields that say how it is read and have no option of their own."""


@app.command()
@takes(Asked)
def sample(context: typer.Context, asked: Asked) -> None:
    """Draw pictures with a base model and adapters; each PNG says how it was made.

    Pictures that are there already are kept, so a request that was cut short goes on.

    Examples:

      finetune sample "a photo of sks dog in the snow" --run runs/mine -n 4

      finetune sample "a red house" --base sd15.safetensors -a style.safetensors@0.7 --strengths 0,0.5,1

      finetune sample "a castle" --image sketch.png --strength 0.5

      finetune sample --from samples/a-red-house-s0-1a2b3c4d.png
    """
    reporter = ConsoleReporter()
    if asked.again is not None:
        _check_alone(context, asked)
        reporter.table("Done", [("Picture", str(_draw_again(asked, asked.again, reporter)))])
        return
    model, wanted = _request(asked)
    check(model, wanted, asked.output)
    made = finetune.sample(model, wanted, asked.output, reporter)
    sheet = [("Sheet", str(asked.output / "sheet.png"))] if len(made) > 1 else []
    reporter.table("Done", [*(("Picture", str(path)) for path in made[:12]), *sheet])


def _request(asked: Asked) -> tuple[ModelConfig, Wanted]:
    """What is asked for; everything that cannot be read is told at once, with what it contradicts."""
    problems: list[str] = []

    def tried(read: Callable[..., Value], *given: Any, otherwise: Value) -> Value:
        try:
            return read(*given)
        except ConfigError as error:
            problems.extend(error.problems or [error.headline])
            return otherwise

    model, own, merged = model_of(asked.base, asked.run)
    said = {name: getattr(asked, name) for name in ("dtype", "clip_skip", "prompt_chunks")}
    said = {name: value for name, value in said.items() if value is not None}
    model = tried(change_section, model, "model", asked.of_base or (), (*PARTS, *READ_AS), otherwise=model)
    model = tried(checked, ModelConfig, model.model_dump() | said, otherwise=model)
    lines = tried(read_prompts, asked.prompts_file, otherwise=["unread"]) if asked.prompts_file else []
    named = [tried(parse_weighted, text, otherwise=(Path(), 1.0)) for text in asked.adapter or ()]
    adapters = [*((path, 1.0) for path in own), *((path, strength) for path, strength in named if path.name)]
    preparation, control = _control(asked.control_picture)
    wanted = Wanted(
        prompts=(*(asked.words or ()), *lines),
        adapters=tuple(adapters),
        strengths=tried(_numbers, asked.factors, otherwise=(1.0,)),
        control=control,
        control_from=preparation,
        refiner=tried(_refiner, asked.second_base, otherwise=None),
        merge_first=merged,
        **{field.name: getattr(asked, field.name) for field in fields(Wanted) if hasattr(asked, field.name)},
    )
    if problems:
        raise ConfigError("No picture can be made:", [*problems, *wanted.problems()])
    return model, wanted


def _draw_again(asked: Asked, picture: Path, reporter: ConsoleReporter) -> Path:
    shot = shot_of(picture)
    model, own, merged = model_of(asked.base, asked.run)
    refiner = _refiner(asked.second_base)
    given = {
        "image": asked.image,
        "mask": asked.mask,
        "control": _control(asked.control_picture)[1],
        "controlnet": asked.controlnet,
        "depth_model": asked.depth_model,
        "refiner": refiner[0] if refiner else None,
        "merge_first": merged,
        "low_memory": asked.low_memory,
    }
    wanted = wanted_again(shot, [*own, *(parse_weighted(text)[0] for text in asked.adapter or ())], given)
    named = model_again(shot, model if asked.base or asked.run else None)
    model = change_section(named, "model", asked.of_base or (), PARTS)
    check(model, wanted, asked.output)
    return finetune.sample_again(shot, model, wanted, asked.output, reporter)


def _check_alone(context: typer.Context, asked: Asked) -> None:
    """Refuse what would have to be dropped, because a picture is made again as it was."""
    flags = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in flags if name and name not in BESIDE_AGAIN}
    given = [flags[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    given = ["prompts" if flag == "words" else flag for flag in given] + _strengths_in(asked.adapter or ())
    if given:
        raise ConfigError(
            f"--from makes a picture again as it was, so {', '.join(given)} cannot be chosen beside it.",
            ["leave them out, or leave --from out and say all of it"],
        )


def _strengths_in(adapters: Sequence[str]) -> list[str]:
    return [f"the strength of {text}" for text in adapters if "@" in text and not Path(text).exists()]


def _control(text: str) -> tuple[str | None, Path | None]:
    """ "canny:photo.jpg" as what prepares the picture, and the picture; a file of that very name wins."""
    preparation, colon, name = text.partition(":")
    if not text or not colon or Path(text).exists():
        return None, Path(text) if text else None
    return preparation, Path(name)


def _refiner(text: str) -> tuple[str, float] | None:
    """(base, share of the schedule where it takes over)."""
    if not text:
        return None
    path, start = parse_weighted(text, REFINER_START)
    return str(path), start


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
