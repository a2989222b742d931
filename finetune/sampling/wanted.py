"""What a user asks `finetune sample` for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.config import ModelConfig
from finetune.errors import ConfigError, nearest
from finetune.families.places import check_place
from finetune.prompt_lines import prompt_problems
from finetune.run_files import load_run_folder
from finetune.sampling.papers import adapter_path
from finetune.sampling.schedulers import SCHEDULERS

STRENGTH = 0.6
"""Usual share of the noise schedule for changing a picture."""
DEPTH = "depth"
PREPARED = ("canny", DEPTH)
"""What may stand before the colon of a control picture; a test holds the names against the table of what they do."""
ROLES = ("image", "mask", "control")
"""Pictures that may be given, fields of `Wanted`."""


@dataclass(frozen=True)
class Wanted:
    """What a user asks for.

    Attributes:
        prompts: what to draw; brackets are emphasis, settings behind a prompt hold for it alone, see `prompt_lines`.
        count: pictures per prompt, with seeds seed, seed + 1, ...
        width, height: pixels; None is the base's own size.
        guidance_scale: None is the family's usual.
        scheduler: name in SCHEDULERS; None is the checkpoint's own.
        merge_first: adapters merged into the base before anything else, as a run's `adapter.merge_first`.
        adapters: (file, strength); a file of any layout, a PEFT folder or a run folder.
        strengths: factors on all adapters, one row of pictures each.
        image, mask, control: pictures that steer; see `Guides`.
        strength: share of the noise schedule run on `image`; None is the usual one.
        controlnet: folder, .safetensors file or hub id of a ControlNet.
        control_from: what makes its picture of `control`, a name in PREPARED; None shows `control` as it is.
        depth_model: folder or hub id of what estimates depth for control_from="depth"; None is the usual one.
        refiner: (base, share of the schedule where it takes over); it draws the end of the first pass.
        upscale: makes a second pass on the picture enlarged by this factor.
        upscale_strength: share of the noise schedule run in that pass.
        low_memory: decode in slices and tiles, text encoders on the accelerator only while they read; slower, the same
            picture up to rounding.
        compile: run the denoiser's blocks as compiled code: a minute or two for the code, then faster on a GPU; the
            same picture up to rounding.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    steps: int = 25
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    merge_first: tuple[str, ...] = ()
    adapters: tuple[tuple[Path, float], ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    image: Path | None = None
    mask: Path | None = None
    control: Path | None = None
    strength: float | None = None
    controlnet: str | None = None
    control_scale: float | None = None
    control_from: str | None = None
    depth_model: str | None = None
    refiner: tuple[str, float] | None = None
    upscale: float | None = None
    upscale_strength: float = 0.5
    batch_size: int = 1
    low_memory: bool = False
    compile: bool = False

    def problems(self) -> list[str]:
        """What cannot be done, whatever the base is."""
        found = []
        if isinstance(self.prompts, str):
            return [f"prompts={self.prompts!r} is one text, read as one prompt a letter; write a tuple."]
        if not self.prompts:
            found.append("there is no prompt; write one, or name a file with --prompts.")
        found += prompt_problems(self.prompts)
        if self.count < 1 or self.steps < 1 or self.batch_size < 1:
            found.append(f"count={self.count}, steps={self.steps} and batch={self.batch_size} must be at least 1.")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            found.append(
                f"scheduler={self.scheduler!r} is not known{nearest(self.scheduler, SCHEDULERS)}; choose "
                f"{', '.join(SCHEDULERS)}."
            )
        if self.upscale is not None and not 1 < self.upscale <= 4:
            found.append(f"upscale={self.upscale} must be above 1 and at most 4.")
        if not self.adapters and self.strengths != (1.0,):
            found.append("strengths are factors on adapters, and none is given; add --adapter FILE or --run FOLDER.")
        if self.control_from is not None and self.control_from not in PREPARED:
            found.append(
                f"control={self.control_from}:... is not known{nearest(self.control_from, PREPARED)}; write "
                f"{' or '.join(PREPARED)} before the colon, or no colon for a picture that is ready."
            )
        if self.depth_model is not None and self.control_from != DEPTH:
            found.append("a depth model is given, but no picture to estimate: write --control depth:PICTURE.")
        if self.compile and self.low_memory:
            found.append("compile is for networks that stay in place, and low_memory moves them; choose one.")
        if self.refiner is not None and not 0 < self.refiner[1] < 1:
            found.append(f"refiner=...@{self.refiner[1]:g} must start above 0 and below 1; 0.8 is usual.")
        given = {name: getattr(self, name) is not None for name in (*ROLES, "controlnet")}
        if self.strength is not None and self.image is None:
            found.append(f"strength={self.strength:g} says how much of a picture changes; name one with --image.")
        if self.control_scale is not None and self.control is None:
            found.append(f"control_scale={self.control_scale:g} is about a control picture; name one with --control.")
        return found + steering_problems(given, STRENGTH if self.strength is None else self.strength)


def model_of(base: str, run: Path | None) -> tuple[ModelConfig, list[Path], tuple[str, ...]]:
    """The base to draw with, the run's own adapter, and what was merged into the base before it was trained."""
    if run is None:
        return ModelConfig(base=base or "demo"), [], ()
    trained = load_run_folder(run)
    model = trained.model.model_copy(update={"base": base}) if base else trained.model
    return model, [run], tuple(trained.adapter.merge_first) if trained.adapter else ()


def check(model: ModelConfig, wanted: Wanted, output: Path) -> None:
    """Refuse what needs no network to be seen: contradictions, and files and folders that are not there.

    Raises:
        UserError: naming everything at once.
    """
    problems = [*wanted.problems(), *_missing(wanted), *place_problems(output)]
    bases = [model.base, *((wanted.refiner[0],) if wanted.refiner else ())]
    looks: list[Callable[[], object]] = [partial(adapter_path, path) for path, _ in wanted.adapters]
    looks += [partial(check_place, base) for base in bases]
    for look in looks:
        try:
            look()
        except ConfigError as error:
            problems.append(error.headline)
    if problems:
        raise ConfigError("No picture can be made:", problems)


def _missing(wanted: Wanted) -> list[str]:
    named = {role: getattr(wanted, role) for role in ROLES}
    return [
        f"--{role} {path} is no file; name a picture." for role, path in named.items() if path and not path.is_file()
    ]


def place_problems(output: Path) -> list[str]:
    """Why `output` can be no folder of pictures."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return [] if there.is_dir() else [f"{there} is a file, so {output} can be no folder; name another with --output."]


def steering_problems(given: Mapping[str, bool], strength: float) -> list[str]:
    """What contradicts itself in a choice of guides.

    Args:
        given: "image", "mask", "control", "controlnet" -> whether there is one.
        strength: see `Guides`.
    """
    found = []
    if given["mask"] and not given["image"]:
        found.append("a mask says what to repaint, so a picture to repaint is needed with it (image).")
    if given["image"] and not 0 < strength <= 1:
        found.append(f"strength={strength} must be above 0 and at most 1; 0.5 to 0.8 is usual.")
    if given["control"] != given["controlnet"]:
        found.append("a control picture and a ControlNet belong together; give both or neither.")
    return found
