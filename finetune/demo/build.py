"""Build the embedded base model from nothing: `python -m finetune.demo.build --out DIR --minutes 150`.

Stages: autoencoder, latents, denoiser, decoder, checker, assemble (which also measures and writes the card). Every
stage keeps its state under `--work` and goes on where it stopped, so a build may be interrupted at any time. Two
workers: `torchrun --nproc_per_node 2 -m finetune.demo.build ...` with OMP_NUM_THREADS=1. `--only` runs some stages;
decoder and denoiser may run at the same time in two processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.demo.assemble import beside, folder_megabytes, new_pipeline, save_pipeline
from finetune.demo.autoencoder import (
    draw_pictures,
    encode,
    new_autoencoder,
    normalise_latents,
    train_autoencoder,
    train_decoder,
)
from finetune.demo.card import write_card
from finetune.demo.checker import Checker, load_checker
from finetune.demo.checker_training import train_checker, validate_checker
from finetune.demo.denoiser import Conditioned, Drawn, drawn_pictures, new_unet, train_denoiser
from finetune.demo.loop import Loop, Settings, rank_and_size
from finetune.demo.measure import measure, write_sheet
from finetune.demo.text import new_text_encoder, new_tokenizer

logger = logging.getLogger("finetune.demo.build")

# Seeds of the drawn pictures; the checker and the card use others.
PICTURES, SINGLE, MIXED = 11, 12, 13
# Latents per file.
SHARD = 2000

# Part of the minutes that each stage may use.
SHARES = {"autoencoder": 0.15, "denoiser": 0.65, "decoder": 0.15, "checker": 0.05}


@dataclass(frozen=True)
class Plan:
    """Where a build works and how much it may spend."""

    out: Path
    """Receives `base/` (the pipeline) and `checker.safetensors`."""
    work: Path
    """State of all stages; may be deleted when the build is done."""
    minutes: float
    """Wall-clock minutes for all training stages together."""
    pictures: int = 40_000
    """Drawn pictures for the autoencoder; the other picture counts follow from it."""
    prompts: int = 240
    """Prompts per measurement."""
    seeds: int = 3
    """Sampling seeds per measurement."""
    mixed_share: float = 0.12
    """Share of two-object, textured and outlined pictures in the denoiser's later batches."""

    def settings(self, stage: str, batch: int, learning_rate: float, **others: float) -> Settings:
        """Training settings of a stage."""
        return Settings(self.work / stage, self.minutes * SHARES[stage], batch, learning_rate, **others)  # type: ignore[arg-type]


def build_autoencoder(plan: Plan) -> None:
    """Draw the pictures, train encoder and decoder, fold the latents' mean and deviation into the weights."""
    target = plan.work / "autoencoder.safetensors"
    if target.exists():
        return
    vae = new_autoencoder()
    pictures = _pictures(plan)
    progress = train_autoencoder(vae, pictures, plan.settings("autoencoder", 16, 2e-3, ema_decay=0.995, hold=0.4))
    if rank_and_size()[0] != 0:
        return
    normalise_latents(vae, drawn_pictures(SINGLE, range(min(2000, plan.pictures)), 0.5, 0.0))
    _write(target, vae)
    logger.info("autoencoder: %d samples", progress.samples)


def build_latents(plan: Plan) -> None:
    """Encode the denoiser's pictures once, in shards that the workers take in turn."""
    vae = trained_autoencoder(plan)
    rank, size = rank_and_size()
    shards = [(*source[:2], start, *source[2:]) for source in _sources(plan) for start in range(0, source[2], SHARD)]
    for name, seed, start, count, plain, mixed in shards[rank::size]:
        target = plan.work / "latents" / f"{name}-{start:06d}.safetensors"
        if not target.exists():
            indices = range(start, min(count, start + SHARD))
            _write(target, {"latents": encode(vae, drawn_pictures(seed, indices, plain, mixed))})


def _latents(plan: Plan, name: str) -> Tensor:
    """All latents of one set, float16 (N, 8, 16, 16)."""
    files = sorted((plan.work / "latents").glob(f"{name}-*.safetensors"))
    return torch.cat([load_file(file)["latents"] for file in files])


def _sources(plan: Plan) -> list[tuple[str, int, int, float, float]]:
    """Name, seed, count, plain share and mixed share of the two sets of training pictures."""
    return [("single", SINGLE, plan.pictures, 0.45, 0.0), ("mixed", MIXED, plan.pictures // 5, 0.5, 1.0)]


def build_denoiser(plan: Plan) -> None:
    """Train UNet and text encoder on the latents."""
    sets = [Drawn(seed, plain, mixed, _latents(plan, name)) for name, seed, _, plain, mixed in _sources(plan)]
    model, tokenizer = new_model()
    settings = plan.settings("denoiser", 24, 1e-3)
    # keep: on CPU the fused attention's backward pass is slower than plain matrix products at this size.
    with sdpa_kernel(SDPBackend.MATH):
        progress = train_denoiser(model, tokenizer, sets[0], sets[1], mixed_share=plan.mixed_share,
                                  settings=settings)  # fmt: skip
    logger.info("denoiser: %d samples", progress.samples)


def build_decoder(plan: Plan) -> None:
    """Train the decoder further on frozen latents."""
    vae = trained_autoencoder(plan)
    progress = train_decoder(vae, _pictures(plan), plan.settings("decoder", 16, 1.5e-3, ema_decay=0.998))
    logger.info("decoder: %d samples", progress.samples)


def build_checker(plan: Plan) -> None:
    """Train the checker on true and reconstructed pictures and note how often it errs."""
    file, report = plan.out / "checker.safetensors", plan.work / "checker.json"
    if report.exists() and file.exists():
        return
    vae = final_autoencoder(plan)
    count = max(40, plan.pictures * 3 // 5)
    checker, progress = train_checker(vae, plan.settings("checker", 64, 2e-3, ema_decay=0.995), file, count)
    found = validate_checker(checker, vae, count=min(2000, count))
    report.write_text(json.dumps({**found, "samples": progress.samples}, indent=1))
    logger.info("checker: %s", found["reconstructed"])


def build_base(plan: Plan) -> None:
    """Put the averaged weights together, measure, write card and sheet, and replace `out/base`."""
    model, tokenizer = new_model()
    Loop(model, plan.settings("denoiser", 24, 1e-3)).use_average()
    vae = final_autoencoder(plan)
    pipeline = new_pipeline(vae, model.unet.eval(), model.text_encoder.eval(), tokenizer)
    with beside(plan.out / "base") as folder:
        save_pipeline(pipeline, folder)
        figures = measure(pipeline, checker_of(plan), plan.prompts, plan.seeds)
        states = {stage: plan.work / stage / "progress.json" for stage in SHARES}
        figures["training"] = {stage: json.loads(f.read_text()) for stage, f in states.items() if f.exists()}
        report = plan.work / "checker.json"
        figures["checker report"] = json.loads(report.read_text()) if report.exists() else None
        figures["megabytes"] = round(folder_megabytes(folder), 1)
        (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        write_sheet(pipeline, folder / "samples.png", min(60, plan.prompts))
        write_card(figures, folder / "README.md")
    logger.info("base: %s", figures["plain prompts"])


STAGES: dict[str, Callable[[Plan], None]] = {
    "autoencoder": build_autoencoder,
    "latents": build_latents,
    "denoiser": build_denoiser,
    "decoder": build_decoder,
    "checker": build_checker,
    "assemble": build_base,
}
# Stages whose loop shares its work among the workers; the first worker does the others alone.
SHARED = ("autoencoder", "latents", "denoiser")


def new_model() -> tuple[Conditioned, object]:
    """Fresh UNet and text encoder, and the tokenizer."""
    tokenizer = new_tokenizer()
    encoder = new_text_encoder(tokenizer)
    return Conditioned(new_unet(encoder.config.hidden_size), encoder), tokenizer


def trained_autoencoder(plan: Plan) -> AutoencoderKL:
    """The autoencoder as it was when its latents were frozen."""
    vae = new_autoencoder()
    vae.load_state_dict(load_file(plan.work / "autoencoder.safetensors"))
    return vae.eval()


def final_autoencoder(plan: Plan) -> AutoencoderKL:
    """The autoencoder with the decoder as far as it was trained further."""
    vae = trained_autoencoder(plan)
    state = plan.work / "decoder" / "state.safetensors"
    if state.exists():
        found = {k.removeprefix("average."): v for k, v in load_file(state).items() if k.startswith("average.")}
        vae.load_state_dict(found, strict=False)
    return vae.eval()


def checker_of(plan: Plan) -> Checker:
    """The checker of this build."""
    return load_checker(plan.out / "checker.safetensors")


def _pictures(plan: Plan) -> np.ndarray:
    file = plan.work / "pictures.npy"
    if rank_and_size()[0] == 0:
        draw_pictures(file, plan.pictures, PICTURES)
    _wait()
    return draw_pictures(file, plan.pictures, PICTURES)


def _write(target: Path, found: torch.nn.Module | dict[str, Tensor]) -> None:
    """Write tensors beside and rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = found if isinstance(found, dict) else found.state_dict()
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def _wait() -> None:
    if rank_and_size()[1] > 1:
        distributed.barrier()


def build(plan: Plan, only: tuple[str, ...] = tuple(STAGES)) -> None:
    """Run the stages in order; finished ones cost nothing."""
    plan.work.mkdir(parents=True, exist_ok=True)
    plan.out.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if name in only:
            if name in SHARED or rank_and_size()[0] == 0:
                logger.info("stage %s", name)
                stage(plan)
            _wait()


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="receives base/ and checker.safetensors")
    parser.add_argument("--work", type=Path, help="state of the stages; default: OUT/work")
    parser.add_argument("--minutes", type=float, default=150.0, help="for all training stages together")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mixed-share", type=float, default=0.12)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "WORLD_SIZE" in os.environ:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", timeout=timedelta(hours=2))
    plan = Plan(asked.out, asked.work or asked.out / "work", asked.minutes, asked.pictures, asked.prompts, asked.seeds,
                asked.mixed_share)  # fmt: skip
    build(plan, tuple(asked.only))


if __name__ == "__main__":
    main()
