"""Parts into a pipeline folder that plain diffusers loads, written beside and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.demo.build.denoiser import NOISE


def new_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on the training schedule; "trailing" steps start at the last, noisiest step."""
    return DPMSolverMultistepScheduler(
        **NOISE,
        timestep_spacing="trailing",
        steps_offset=1,  # unused by "trailing", but pipelines warn about 0
    )


def new_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as a Stable Diffusion pipeline without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder next to `folder` to write into; takes its place when the block ends well."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    for file in new.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline with float16 weights; the configurations still ask for float32, which CPUs run best."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.to(dtype=torch.float32)
    config = folder / "text_encoder" / "config.json"
    # keep: transformers loads the dtype that the configuration names; diffusers loads float32 unless told otherwise.
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    _write_original_vocabulary(pipeline.tokenizer, folder / "tokenizer")


def _write_original_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Also write vocab.json and merges.txt, which readers other than transformers 5 look for."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def folder_megabytes(folder: Path) -> float:
    """Size of all files in a folder, 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
