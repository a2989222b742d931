"""Pictures from prompts, through the family's public diffusers pipeline built around the live networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from finetune.adapters.files import AdapterFile
from finetune.errors import ConfigError, NumericError, nearest
from finetune.families.base import Components, ModelFamily
from finetune.sampling.apply import adapter_applied, evaluating

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""name -> diffusers class and what is set besides the checkpoint's own noise schedule."""

Progress = Callable[[int, int], None]
"""Called with (denoising steps done, steps in all), over all batches."""


@torch.no_grad()
def generate(  # noqa: PLR0913 - what the user chooses, one keyword each
    family: ModelFamily,
    components: Components,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    adapter: AdapterFile | None = None,
) -> list[Image.Image]:
    """One picture per prompt.

    A picture belongs to its prompt and seed, not to the batch it was made in: every picture has its own noise
    generator, seeded as a diffusers user would (`torch.Generator("cpu").manual_seed(seed)`), and is decoded
    alone. What remains is that matrix kernels round differently for other batch sizes, which is below one
    grey level in most pixels.

    Args:
        prompts: what to draw.
        seeds: one per prompt.
        steps: denoising steps, at least 1.
        guidance_scale: strength of classifier-free guidance; 1 turns it off and halves the work.
        negative_prompt: what the guidance steers away from; unused without guidance.
        height, width: pixels; None means the size the denoiser was configured for.
        scheduler: a name in SCHEDULERS; None means the checkpoint's own.
        batch_size: pictures per pass; changes speed and memory only.
        progress: see `Progress`.
        adapter: applied, unmerged, while the pictures are made. None samples the networks as they are,
            including whatever a training run has attached to them.

    Raises:
        ConfigError: if the arguments contradict each other.
        CheckpointError: if the adapter does not fit the base.
        NumericError: if a picture is not finite.
    """
    problems = [
        *_count_problems(prompts, seeds, steps, batch_size),
        *_size_problems(family, components, {"height": height, "width": width}),
    ]
    if problems:
        raise ConfigError("No picture can be made:", problems)
    pipeline = build_pipeline(family, components, scheduler)
    batches = [
        range(first, min(first + batch_size, len(prompts))) for first in range(0, len(prompts), batch_size)
    ]
    pictures: list[Image.Image] = []
    with evaluating(components), adapter_applied(family, components, adapter), _one_dtype(family, components):
        for number, batch in enumerate(batches):
            latents = pipeline(
                prompt=[prompts[index] for index in batch],
                negative_prompt=[negative_prompt] * len(batch) if guidance_scale > 1 else None,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(seeds[index]) for index in batch],
                output_type="latent",
                callback_on_step_end=_reporter(progress, number, steps, len(batches)),
            ).images
            for index, latent in zip(batch, latents, strict=True):
                pictures.append(_decode(family, components, latent, f"prompt {index} ({prompts[index]!r})"))
    return pictures


def build_pipeline(family: ModelFamily, components: Components, scheduler: str | None = None) -> Any:
    """The family's public pipeline around the live networks; nothing is copied or reloaded.

    Raises:
        ConfigError: if the scheduler's name is not known.
    """
    constructor = getattr(diffusers, family.pipeline_class)
    parts: dict[str, Any] = {
        family.denoiser: components.denoiser,
        "vae": components.vae,
        "scheduler": _scheduler(components, scheduler),
        **components.text_encoders,
        **{
            name.replace("text_encoder", "tokenizer"): tokenizer
            for name, tokenizer in components.tokenizers.items()
        },
        "requires_safety_checker": False,
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


def _scheduler(components: Components, name: str | None) -> Any:
    if name is not None and name not in SCHEDULERS:
        raise ConfigError(
            f"scheduler={name!r} is not known{nearest(name, SCHEDULERS)}; choose {', '.join(SCHEDULERS)}, "
            "or none for the checkpoint's own."
        )
    own = components.scheduler_config.get("_class_name", "DDIMScheduler")
    class_name, settings = SCHEDULERS[name] if name is not None else (own, {})
    return getattr(diffusers, class_name).from_config(components.scheduler_config, **settings)


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
    stride = family.vae_stride(components.vae)
    return [
        f"{name}={pixels} is not a multiple of {stride} pixels, the side of one latent."
        for name, pixels in sizes.items()
        if pixels is not None and (pixels < stride or pixels % stride)
    ]


def _one_dtype(family: ModelFamily, components: Components) -> AbstractContextManager[Any]:
    """Autocast if the networks are held in different number formats, as in mixed training."""
    networks = [components.denoiser, *components.text_encoders.values()]
    dtypes = {parameter.dtype for root in networks for parameter in root.parameters()}
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


def _reporter(progress: Progress | None, batch: int, steps: int, batches: int) -> Any:
    def report(pipeline: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(batch * steps + min(step + 1, steps), batches * steps)  # PNDM calls once more
        return arguments

    return report
