"""What a user asks `finetune sample` for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import nearest
from finetune.prompt_lines import prompt_problems
from finetune.sampling.edges import PREPARATIONS
from finetune.sampling.guides import STRENGTH, steering_problems
from finetune.sampling.schedulers import SCHEDULERS

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
        controlnet: folder or hub id of a ControlNet.
        control_from: what makes its picture of `control`, a name in PREPARATIONS; None shows `control` as it is.
        refiner: (base, share of the schedule where it takes over); it draws the end of the first pass.
        upscale: makes a second pass on the picture enlarged by this factor.
        upscale_strength: share of the noise schedule run in that pass.
        low_memory: decode in slices and tiles, text encoders on the accelerator only while they read; slower, the same
            picture up to rounding.
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
    refiner: tuple[str, float] | None = None
    upscale: float | None = None
    upscale_strength: float = 0.5
    batch_size: int = 1
    low_memory: bool = False

    def problems(self) -> list[str]:
        """What cannot be done, whatever the base is."""
        found = []
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
        if self.control_from is not None and self.control_from not in PREPARATIONS:
            found.append(
                f"control={self.control_from}:... is not known{nearest(self.control_from, PREPARATIONS)}; write "
                f"{' or '.join(PREPARATIONS)} before the colon, or no colon for a picture that is ready."
            )
        if self.refiner is not None and not 0 < self.refiner[1] < 1:
            found.append(f"refiner=...@{self.refiner[1]:g} must start above 0 and below 1; 0.8 is usual.")
        given = {name: getattr(self, name) is not None for name in (*ROLES, "controlnet")}
        if self.strength is not None and self.image is None:
            found.append(f"strength={self.strength:g} says how much of a picture changes; name one with --image.")
        if self.control_scale is not None and self.control is None:
            found.append(f"control_scale={self.control_scale:g} is about a control picture; name one with --control.")
        return found + steering_problems(given, STRENGTH if self.strength is None else self.strength)
