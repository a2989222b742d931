"""Pictures from prompts, through the family's public diffusers pipeline built around the live networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import diffusers
import torch
from PIL import Image
from torch import Tensor

from finetune.adapters.files import AdapterFile
from finetune.errors import ConfigError, NumericError
from finetune.families.base import Components, ModelFamily
from finetune.sampling.apply import adapter_applied, evaluating
from finetune.sampling.guides import Guides, begun, for_base, kept, pictures_for, steered
from finetune.sampling.keeping import Keeping
from finetune.sampling.schedulers import SCHEDULERS, build_scheduler
from finetune.sampling.stages import Refiner, Relay, Stage

Progress = Callable[[int, int], None]
"""Called with (denoising steps done, steps in all), over all batches."""
Applied = tuple[AdapterFile, float]
"""An adapter and its strength; 1 is as trained."""


@torch.no_grad()
def generate(  # noqa: PLR0913 - what the user chooses, one keyword each
    family: ModelFamily,
    components: Components,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    adapters: Sequence[Applied] = (),
    guides: Guides | None = None,
    refiner: Refiner | None = None,
    emphasis: bool = False,
) -> list[Image.Image]:
    """One picture per prompt.

    A picture belongs to its prompt and seed, not to the batch it was made in: each has its own noise generator,
    seeded as a diffusers user would (`torch.Generator("cpu").manual_seed(seed)`), and is decoded alone. What remains
    is that matrix kernels round differently for other batch sizes: less than a grey level in most pixels.

    Args:
        prompts: what to draw.
        seeds: one per prompt.
        steps: denoising steps, at least 1.
        guidance_scale: strength of guidance; 1 turns it off and halves the work. None: the family's usual one.
        negative_prompt: what the guidance steers away from; unused without guidance.
        height, width: pixels; None means the size the denoiser was configured for.
        scheduler: a name in SCHEDULERS; None means the checkpoint's own.
        batch_size: pictures per pass; changes speed and memory only.
        progress: see `Progress`.
        adapters: applied, unmerged, while the pictures are made. None samples the networks as they are,
            including whatever a training run has attached to them.
        guides: a picture to change, a mask, or a control picture.
        refiner: draws the last of the steps; adapters and control pictures steer the first base only.
        emphasis: read brackets in prompts as emphasis; see `weighting`. Otherwise they are plain text.

    Raises:
        ConfigError: if the arguments contradict each other.
        CheckpointError: if the adapter does not fit the base.
        NumericError: if a picture is not finite.
    """
    guides = for_base(guides or Guides(), family, components)
    guidance = family.usual_guidance if guidance_scale is None else guidance_scale
    problems = [
        *_unread_problems(family, negative_prompt),
        *guides.problems(),
        *_count_problems(prompts, seeds, steps, batch_size),
        *_size_problems(family, components, {"height": height, "width": width}),
    ]
    if problems:
        raise ConfigError("No picture can be made:", problems)
    size = _size(family, components, height, width)
    batches = [range(len(prompts))[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    pictures: list[Image.Image] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(components))
        for file, strength in adapters:
            stack.enter_context(adapter_applied(family, components, file, strength))
        stack.enter_context(_one_dtype(family, components, refiner))
        pipeline = steered(build_pipeline(family, components, scheduler), guides)
        stage = Stage(family, components, pipeline, negative_prompt, guidance, emphasis)
        relay = stage.then(refiner, partial(build_pipeline, scheduler=scheduler)) if refiner else Relay(stage)
        said = relay.words([[prompts[index] for index in batch] for batch in batches])
        for number, (batch, words) in enumerate(zip(batches, said, strict=True)):
            generators = [torch.Generator().manual_seed(seeds[index]) for index in batch]
            dtype = next(iter(words[0].values())).dtype
            keep = kept(guides, family, components, size, generators, dtype)
            after = _Bar(progress, number, len(batches), guides.steps(steps), keep)
            canvas = _canvas(family, components, pipeline, guides, size, len(batch))
            canvas |= begun(guides, family, components, pipeline, size, generators, dtype, steps)
            latents = relay.run(words, canvas, after.part, num_inference_steps=steps, generator=generators)
            latents = family.as_picture(latents, *_latent_size(family, components, height, width))
            for index, latent in zip(batch, latents, strict=True):
                pictures.append(_decode(family, components, latent, f"prompt {index} ({prompts[index]!r})"))
    return pictures


def build_pipeline(family: ModelFamily, components: Components, scheduler: str | None = None) -> Any:
    """The family's public pipeline around the live networks; nothing is copied or reloaded.

    Raises:
        ConfigError: if the scheduler's name is not known.
    """
    constructor = getattr(diffusers, family.pipeline_for(cast(Any, components.denoiser).config))
    parts: dict[str, Any] = {
        family.denoiser: components.denoiser,
        "vae": components.vae,
        "scheduler": build_scheduler(components, scheduler, sigmas=family.hands_sigmas),
        **components.text_encoders,
        **{
            name.replace("text_encoder", "tokenizer"): tokenizer
            for name, tokenizer in components.tokenizers.items()
        },
        "requires_safety_checker": False,
        "add_watermarker": False,
        **components.pipeline_config,
    }
    arguments = {}
    for name, parameter in inspect.signature(constructor.__init__).parameters.items():
        if name in parts:
            arguments[name] = parts[name]
        elif name != "self" and parameter.default is inspect.Parameter.empty:
            arguments[name] = None
    pipeline = constructor(**arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _size(family: ModelFamily, components: Components, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels; None is the base's own size."""
    own = family.native_resolution(components)
    return height or own, width or own


def _latent_size(
    family: ModelFamily, components: Components, height: int | None, width: int | None
) -> tuple[int, int]:
    """(height, width) in latents; None is the base's own size."""
    assert components.vae is not None, "checked with the sizes"
    stride = family.vae_stride(components.vae)
    rows, columns = _size(family, components, height, width)
    return rows // stride, columns // stride


def _canvas(
    family: ModelFamily, components: Components, pipeline: Any, guides: Guides, size: tuple[int, int], count: int
) -> dict[str, Any]:
    """What is drawn on: the guides, a size, or an empty picture for a pipeline that can only repaint."""
    if guides.starts_from_image or guides.control is not None:
        return pictures_for(guides, pipeline, size, count)
    if not family.pipeline_starts_from_picture:
        return {"height": size[0], "width": size[1]}
    rows, columns = _latent_size(family, components, *size)
    channels = int(cast(Any, components.vae).config.latent_channels)
    empty = torch.zeros(count, channels, rows, columns, device=family.device_of(components.denoiser))
    return {"image": empty, "strength": 1.0}


def _unread_problems(family: ModelFamily, negative_prompt: str) -> list[str]:
    if not negative_prompt or not family.distilled_guidance:
        return []
    return [f"{family.name} reads no negative prompt ({negative_prompt!r}): its guidance is distilled; leave it out."]


def _count_problems(prompts: Sequence[str], seeds: Sequence[int], steps: int, batch_size: int) -> list[str]:
    problems = []
    if len(seeds) != len(prompts):
        problems.append(f"there are {len(prompts)} prompts and {len(seeds)} seeds; give one seed per prompt.")
    if steps < 1 or batch_size < 1:
        problems.append(f"steps={steps} and batch_size={batch_size} must be at least 1.")
    return problems


def _size_problems(family: ModelFamily, components: Components, sizes: dict[str, int | None]) -> list[str]:
    if components.vae is None:
        return ["the autoencoder is not loaded, so nothing can be drawn; load the base with it."]
    stride = family.vae_stride(components.vae) * family.packing
    return [
        f"{name}={pixels} is not a multiple of {stride} pixels, the side of one latent or patch of them."
        for name, pixels in sizes.items()
        if pixels is not None and (pixels < stride or pixels % stride)
    ]


def _one_dtype(
    family: ModelFamily, components: Components, refiner: Refiner | None
) -> AbstractContextManager[Any]:
    """Autocast if the networks that the pipeline runs are held in different number formats, as in mixed training."""
    networks: list[Any] = [components.denoiser, *components.text_encoders.values()]
    networks += [] if refiner is None else [refiner.components.denoiser]
    # keep: weights of one byte are storage; their layers say themselves what they compute in.
    every = {parameter.dtype for root in networks for parameter in root.parameters()}
    dtypes = {dtype for dtype in every if dtype.itemsize > 1}
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
    device = family.device_of(components.denoiser)
    return torch.autocast(device.type, dtype=narrow) if len(dtypes) > 1 else nullcontext()


def _decode(family: ModelFamily, components: Components, latent: Tensor, what: str) -> Image.Image:
    """A picture from one scaled latent of shape (C, h, w), in the autoencoder's own number format."""
    assert components.vae is not None
    parameter = next(components.vae.parameters())
    # keep: an autoencoder in fp32 must not run under a half-precision denoiser's autocast; fp16 overflows.
    with torch.autocast(parameter.device.type, enabled=False):
        pixels = family.decode_latents(components.vae, latent[None].to(parameter.device, parameter.dtype))[
            0
        ].float()
    if not bool(torch.isfinite(pixels).all()):
        raise NumericError(
            f"The picture for {what} is not finite.",
            ["adapter or base overflow in this number format: sample in fp32 or bf16, or train more gently."],
        )
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class _Bar:
    """What happens after each step of a batch: the mask keeps its part, and progress is told."""

    progress: Progress | None
    batch: int
    batches: int
    steps: int
    kept: Keeping | None

    def part(self, first: float, last: float) -> Any:
        """A pipeline's callback for the steps from the share `first` to the share `last`."""
        before = round(self.steps * first)
        span = round(self.steps * last) - before

        def after(pipeline: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
            if self.progress is not None:
                # keep: Heun and PNDM call the denoiser more often than once per step.
                done = (step + 1) * span // max(1, pipeline.num_timesteps)
                self.progress(self.batch * self.steps + before + min(done, span), self.batches * self.steps)
            if self.kept is not None:
                arguments["latents"] = self.kept.over(arguments["latents"], pipeline.scheduler, step, timestep)
            return arguments

        return after


__all__ = ["SCHEDULERS", "Applied", "Progress", "Refiner", "build_pipeline", "generate"]
