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

from finetune.demo import prompts as asked
from finetune.demo.build.autoencoder import psnr, reconstruct
from finetune.demo.build.pictures import autoencoder_picture
from finetune.demo.checker import Checker, score
from finetune.demo.prompts import Prompt
from finetune.demo.scenes import COLOURS, draw_array, random_scene
from finetune.demo.shapes import OBJECTS
from finetune.demo.subjects import neon_array, subject_array

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


def follow_pairs(
    pipeline: StableDiffusionPipeline, checker: Checker, count: int, seeds: int
) -> dict[str, float]:
    """How two-object prompts are followed: shares of pictures, and how often which relation came out.

    Returns:
        "layout": beside or above each other as asked; "objects": both objects there, in whatever places; "relation":
        both there and in their places; "order, given both": the last among those with both there and laid out as
        asked, where chance is one half; "everything": colours and background as well.
    """
    prompts = asked.pair_prompts(count)
    totals: dict[str, list[bool]] = {}
    for seed in range(seeds):
        verdicts = checker.judge(sample(pipeline, [p.prompt for p in prompts], seed))
        for verdict, wanted in zip(verdicts, (p.expected for p in prompts), strict=True):
            layout = verdict.layout == wanted["layout"]
            both = {verdict.first, verdict.second} == {wanted["first"], wanted["second"]} and verdict.layout != "alone"
            placed = layout and both and verdict.first == wanted["first"]
            found = {"layout": layout, "objects": both, "relation": placed}
            if layout and both:
                found["order, given both"] = placed
            found["everything"] = all(getattr(verdict, name) == value for name, value in wanted.items())
            for name, hit in found.items():
                totals.setdefault(name, []).append(hit)
    return {name: sum(hits) / len(hits) for name, hits in totals.items()}


def seconds_per_picture(pipeline: StableDiffusionPipeline, count: int = 5) -> float:
    """CPU seconds of one 20-step picture made alone in one thread; the best of a few: other load only adds."""
    threads = torch.get_num_threads()
    # keep: more threads wait for each other at this size, and waiting counts as CPU time.
    torch.set_num_threads(1)
    sample(pipeline, ["a red ball"])
    seconds = []
    for index in range(count):
        started = time.process_time()
        sample(pipeline, ["a red ball"], seed=index)
        seconds.append(time.process_time() - started)
    torch.set_num_threads(threads)
    return min(seconds)


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
    """Every object alone, with colours, with everything named, two objects, textures and outlines; 12 columns."""
    others = [
        asked.ordinary_prompts(24, seed=1),
        asked.full_prompts(24, seed=1),
        asked.pair_prompts(12, seed=1),
        asked.look_prompts(36, seed=1)[::3],
    ]
    return [f"a {name}" for name in OBJECTS] + [prompt.prompt for group in others for prompt in group]


def write_sheet(pipeline: StableDiffusionPipeline, file: Path, count: int = 60, seed: int = 0) -> None:
    """Write the sample sheet (its first `count` pictures) as a PNG of at most 128 colours, which keeps it small."""
    picture = sheet(sample(pipeline, sheet_prompts()[:count], seed), 12)
    picture.quantize(128).save(file, optimize=True)


def measure(pipeline: StableDiffusionPipeline, checker: Checker, prompts: int, seeds: int) -> dict[str, object]:
    """All figures of the card."""
    return {
        "autoencoder": autoencoder_report(pipeline.vae, count=min(200, prompts)),
        "plain prompts": follow(pipeline, checker, asked.ordinary_prompts(prompts), seeds),
        "full prompts": follow(pipeline, checker, asked.full_prompts(prompts), seeds),
        "pair prompts": follow_pairs(pipeline, checker, prompts, seeds),
        "look prompts": follow(pipeline, checker, asked.look_prompts(max(36, prompts // 3)), seeds),
        "prompts": prompts,
        "seeds": seeds,
        "seconds per picture": round(seconds_per_picture(pipeline), 3),
    }
