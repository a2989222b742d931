"""How well the base draws what it is asked for, counted by the checker, and a sheet to look at."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from finetune.demo.autoencoder import psnr, reconstruct
from finetune.demo.checker import Checker, score
from finetune.demo.pictures import autoencoder_picture
from finetune.demo.subjects import PROMPTS, Prompt, neon_array, subject_array
from finetune.demo.world import COLOURS, OBJECTS, draw_array, random_scene

STEPS = 20
GUIDANCE = 3.0


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int = 0, *, steps: int = STEPS,
    guidance: float = GUIDANCE, batch: int = 24,
) -> Tensor:  # fmt: skip
    """Pictures for prompts, pixels (N, 3, 64, 64) in -1..1. The noise of picture i follows from (seed, i) alone."""
    parts = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed * 100003 + start + i) for i in range(len(some))]
        images = pipeline(
            some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="pt"
        ).images
        parts.append(images.float() * 2 - 1)
    return torch.cat(parts)


def follow(
    pipeline: StableDiffusionPipeline, checker: Checker, prompts: Sequence[Prompt], seeds: int
) -> dict[str, float]:
    """Share of asked attributes that the pictures show, over all prompts and `seeds` sampling seeds."""
    verdicts, expected = [], []
    for seed in range(seeds):
        verdicts += checker.judge(sample(pipeline, [p.prompt for p in prompts], seed))
        expected += [p.expected for p in prompts]
    found = score(verdicts, expected)
    for thing in OBJECTS:
        hits = [v.object == thing for v, e in zip(verdicts, expected, strict=True) if e.get("object") == thing]
        found[f"object: {thing}"] = sum(hits) / max(1, len(hits))
    return found


def autoencoder_report(vae: AutoencoderKL, count: int = 200) -> dict[str, float]:
    """Reconstruction in dB (mean over pictures) on pictures that no training stage saw."""
    rngs = [np.random.default_rng((31, i)) for i in range(count)]
    kinds = {
        "world": [draw_array(random_scene(rng, 0.5, 0.15)) for rng in rngs],
        "training mix": [autoencoder_picture(rng) for rng in rngs],
        "subject robot": [subject_array("robot", rng) for rng in rngs],
        "subject fish": [subject_array("fish", rng) for rng in rngs],
        "neon style": [neon_array(list(OBJECTS)[i % 12], list(COLOURS)[i % 9], rng) for i, rng in enumerate(rngs)],
    }
    report = {}
    for kind, pictures in kinds.items():
        stacked = np.stack(pictures)
        report[kind] = round(psnr(stacked, reconstruct(vae, stacked)), 2)
    return report


def seconds_per_picture(pipeline: StableDiffusionPipeline, count: int = 4) -> float:
    """CPU seconds of one 20-step picture made alone, mean of a few."""
    sample(pipeline, ["a red ball"])
    started = time.process_time()
    for index in range(count):
        sample(pipeline, ["a red ball"], seed=index)
    return (time.process_time() - started) / count


def sheet(pictures: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Pixels (N, 3, H, W) in -1..1 laid out in rows, read left to right."""
    count, _, height, width = pictures.shape
    rows = (count + columns - 1) // columns
    canvas = np.full((rows * (height + 2), columns * (width + 2), 3), 128, np.uint8)
    array = ((pictures.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for index, picture in enumerate(array):
        y, x = index // columns * (height + 2), index % columns * (width + 2)
        canvas[y : y + height, x : x + width] = picture
    image = Image.fromarray(canvas)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def sheet_prompts() -> list[str]:
    """Every object alone, with a colour and a background, and with everything named; 12 columns."""
    full = [p.prompt for p in PROMPTS.full_prompts(24, seed=1)]
    return [f"a {name}" for name in OBJECTS] + [p.prompt for p in PROMPTS.ordinary_prompts(24, seed=1)] + full


def write_sheet(pipeline: StableDiffusionPipeline, file: Path, count: int = 60, seed: int = 0) -> None:
    """Write the sample sheet (its first `count` pictures) as a PNG of at most 128 colours, which keeps it small."""
    picture = sheet(sample(pipeline, sheet_prompts()[:count], seed), 12)
    picture.quantize(128).save(file, optimize=True)


def measure(pipeline: StableDiffusionPipeline, checker: Checker, prompts: int, seeds: int) -> dict[str, object]:
    """All figures of the card."""
    return {
        "autoencoder": autoencoder_report(pipeline.vae, count=min(200, prompts)),
        "plain prompts": follow(pipeline, checker, PROMPTS.ordinary_prompts(prompts), seeds),
        "full prompts": follow(pipeline, checker, PROMPTS.full_prompts(prompts), seeds),
        "prompts": prompts,
        "seeds": seeds,
        "seconds per picture": round(seconds_per_picture(pipeline), 3),
    }
