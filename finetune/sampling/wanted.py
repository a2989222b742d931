"""What a user asks `finetune sample` for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import nearest
from finetune.sampling.guides import steering_problems
from finetune.sampling.schedulers import SCHEDULERS

ROLES = ("image", "mask", "control")
"""Pictures that may be given, fields of `Wanted`."""


@dataclass(frozen=True)
class Wanted:
    """What a user asks for.

    Attributes:
        prompts: what to draw; brackets are emphasis.
        count: pictures per prompt, with seeds seed, seed + 1, ...
        width, height: pixels; None is the base's own size.
        guidance_scale: None is the family's usual.
        scheduler: name in SCHEDULERS; None is the checkpoint's own.
        merge_first: adapters merged into the base before anything else, as a run's `adapter.merge_first`.
        adapters: (file, strength); a file of any layout, a PEFT folder or a run folder.
        strengths: factors on all adapters, one row of pictures each.
        image, mask, control: pictures that steer; see `Guides`.
        strength: share of the noise schedule run on `image`.
        controlnet: folder or hub id of a ControlNet.
        upscale: makes a second pass on the picture enlarged by this factor.
        upscale_strength: share of the noise schedule run in that pass.
        low_memory: decode in slices and tiles; slower, the same picture up to rounding.
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
    strength: float = 0.6
    controlnet: str | None = None
    control_scale: float = 1.0
    upscale: float | None = None
    upscale_strength: float = 0.5
    batch_size: int = 1
    low_memory: bool = False

    def problems(self) -> list[str]:
        """What cannot be done, whatever the base is."""
        found = []
        if not self.prompts:
            found.append("there is no prompt; write one, or name a file with --prompts.")
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
        given = {name: getattr(self, name) is not None for name in (*ROLES, "controlnet")}
        return found + steering_problems(given, self.strength)
