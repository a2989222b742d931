"""A base in its pipeline, told about prompts batch by batch; and a second one that takes over for the last steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from PIL import Image
from torch import Tensor

from finetune.devices import on_device
from finetune.errors import ConfigError
from finetune.families.base import Components, ModelFamily
from finetune.sampling.guides import Guides, steered
from finetune.sampling.words import told

Build = Callable[[ModelFamily, Components], Any]
"""What puts a base into its pipeline."""
Bar = Callable[[float, float], Any]
"""(first, last share of the schedule) -> a pipeline's callback for the steps between."""
Words = dict[str, Tensor]
"""A batch's encoded prompts as arguments of a pipeline's call."""


@dataclass(frozen=True)
class Refiner:
    """A second base that draws the end of the schedule, where little noise is left.

    Attributes:
        start: share of the noise schedule that the first base has run when it hands over, in (0, 1).

    Source: Podell et al. 2023, SDXL, arXiv:2307.01952, section 2.5.
    """

    family: ModelFamily
    components: Components
    start: float = 0.8


@dataclass(frozen=True)
class Stage:
    """One base in its pipeline, and what it is told besides prompts."""

    family: ModelFamily
    components: Components
    pipeline: Any
    negative_prompt: str
    guidance: float
    emphasis: bool

    def words(self, batches: Sequence[list[str]]) -> list[Words]:
        """What the pipeline is told of each batch's prompts; the text encoders visit the denoiser's device for it."""
        negative = self.negative_prompt if self.guidance > 1 and not self.family.distilled_guidance else None
        encoders = list(self.components.text_encoders.values())
        with on_device(encoders, self.family.device_of(self.components.denoiser)):
            return [
                told(self.family, self.components, prompts, negative, emphasis=self.emphasis) for prompts in batches
            ]

    def run(self, words: Words, **arguments: Any) -> Tensor:
        """The pipeline's latents for a batch.

        Raises:
            ConfigError: for what the pipeline refuses.
        """
        try:
            drawn = self.pipeline(**words, **arguments, guidance_scale=self.guidance, output_type="latent")
        except ValueError as error:
            raise ConfigError(
                f"{type(self.pipeline).__name__} refuses: {str(error).splitlines()[0]}",
                ["diffusers draws what is asked for with other bases; leave out the picture, mask or control picture."]
                if "image" in arguments
                else [],
            ) from error
        return cast(Tensor, drawn.images)

    def then(self, refiner: Refiner, build: Build) -> Relay:
        """This stage, and one that goes on with its latents, told the same.

        Raises:
            ConfigError: if one of the two pipelines cannot share a schedule; all reasons at once.
        """
        own = steered(build(refiner.family, refiner.components), Guides(image=Image.new("RGB", (1, 1))))
        problems = []
        if not 0 < refiner.start < 1:
            problems.append(f"it starts at {refiner.start:g} of the schedule; choose above 0 and below 1, e.g. 0.8.")
        if "denoising_end" not in inspect.signature(self.pipeline.__call__).parameters:
            problems.append(f"the base's {type(self.pipeline).__name__} cannot hand over within its schedule.")
        if "denoising_start" not in inspect.signature(own.__call__).parameters:
            problems.append(f"{refiner.components.source} is a {refiner.family.name}, which cannot take over.")
        if problems:
            raise ConfigError("The refiner cannot be used:", problems)
        second = replace(self, family=refiner.family, components=refiner.components, pipeline=own)
        return Relay(self, second, refiner.start)


@dataclass(frozen=True)
class Relay:
    """One stage, or two in turn; `start` is the share of the schedule where the second takes over."""

    first: Stage
    second: Stage | None = None
    start: float = 1.0

    def words(self, batches: Sequence[list[str]]) -> list[tuple[Words, ...]]:
        """What each stage is told of each batch's prompts."""
        stages = [self.first, *([self.second] if self.second is not None else [])]
        return list(zip(*(stage.words(batches) for stage in stages), strict=True))

    def run(self, words: tuple[Words, ...], canvas: dict[str, Any], bar: Bar, **common: Any) -> Tensor:
        """The latents of a batch.

        Args:
            words: an item of what `words` gives.
            canvas: what the first stage draws on.
            bar: makes the callback of the steps between two shares of the schedule.
            common: arguments of both pipelines.
        """
        common_first = {**canvas, **common, "callback_on_step_end": bar(0.0, self.start)}
        if self.second is None:
            return self.first.run(words[0], **common_first)
        latents = self.first.run(words[0], **common_first, denoising_end=self.start)
        return self.second.run(
            words[1], image=latents, denoising_start=self.start, **common, callback_on_step_end=bar(self.start, 1.0)
        )
