"""Build the embedded base model from nothing: `python -m finetune.demo.build --out DIR --minutes 150`.

Stages: autoencoder, latents, denoiser, details, decoder, checker, assemble (which also measures and writes the card).
Every stage keeps its state under `--work` and goes on where it stopped, so a build may be interrupted at any time. Two
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

from finetune.demo.build.assemble import beside, folder_megabytes, new_pipeline, save_pipeline
from finetune.demo.build.autoencoder import (
    draw_pictures,
    encode,
    new_autoencoder,
    normalise_latents,
    train_autoencoder,
    train_decoder,
    widened,
)
from finetune.demo.build.card import write_card
from finetune.demo.build.checker_training import train_checker, validate_checker
from finetune.demo.build.denoiser import (
    Conditioned,
    Drawn,
    Mix,
    denoising_loss,
    details,
    drawn_pictures,
    large_first,
    new_unet,
)
from finetune.demo.build.loop import Loop, Settings, rank_and_size, train
from finetune.demo.build.measure import measure, write_sheet
from finetune.demo.build.text import new_text_encoder, new_tokenizer
from finetune.demo.checker import Checker, load_checker

logger = logging.getLogger("finetune.demo.build")

# Seeds of the drawn pictures; the checker and the card use others.
PICTURES, SINGLE, MIXED, VARIED, PAIRS = 11, 12, 13, 14, 15
SETS = {
    "single": (SINGLE, 1.0, Mix(plain=0.45)),
    "mixed": (MIXED, 0.2, Mix(plain=0.5, mixed=1.0)),
    "varied": (VARIED, 0.6, Mix(plain=0.0, small=0.5)),
    "pairs": (PAIRS, 0.4, Mix(plain=0.0, mixed=1.0, pairs=1.0)),
}
"""The denoiser's sets of training pictures: name -> seed, count as a share of `Plan.pictures`, what they show."""
# Latents per file.
SHARD = 2000

# Part of the minutes that each stage may use.
SHARES = {"autoencoder": 0.11, "denoiser": 0.43, "details": 0.25, "decoder": 0.17, "checker": 0.04}


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
    normalise_latents(vae, drawn_pictures(SINGLE, range(min(2000, plan.pictures)), SETS["single"][2]))
    _write(target, vae)
    logger.info("autoencoder: %d samples", progress.samples)


def build_latents(plan: Plan) -> None:
    """Encode the denoiser's pictures once, in shards that the workers take in turn."""
    vae = trained_autoencoder(plan)
    rank, size = rank_and_size()
    shards = [(name, start) for name in SETS for start in range(0, _count(plan, name), SHARD)]
    for name, start in shards[rank::size]:
        target = plan.work / "latents" / f"{name}-{start:06d}.safetensors"
        if not target.exists():
            seed, _, mix = SETS[name]
            indices = range(start, min(_count(plan, name), start + SHARD))
            _write(target, {"latents": encode(vae, drawn_pictures(seed, indices, mix))})


def _count(plan: Plan, name: str) -> int:
    return int(plan.pictures * SETS[name][1])


def _drawn(plan: Plan, name: str) -> Drawn:
    """One set with all its latents."""
    seed, _, mix = SETS[name]
    files = sorted((plan.work / "latents").glob(f"{name}-*.safetensors"))
    return Drawn(seed, mix, torch.cat([load_file(file)["latents"] for file in files]))


def build_denoiser(plan: Plan) -> None:
    """Train UNet and text encoder on the latents, large objects first."""
    model, tokenizer = new_model()
    settings = denoiser_settings(plan)
    choose = large_first(_drawn(plan, "single"), _drawn(plan, "mixed"))
    # keep: on CPU the fused attention's backward pass is slower than plain matrix products at this size.
    with sdpa_kernel(SDPBackend.MATH):
        progress = train(model, settings, denoising_loss(model, tokenizer, choose, settings.batch))
    logger.info("denoiser: %d samples", progress.samples)


def build_details(plan: Plan) -> None:
    """Train both further from their averages on what is hard."""
    model, tokenizer = new_model()
    Loop(model, denoiser_settings(plan)).use_average()
    settings = details_settings(plan)
    choose = details({name: _drawn(plan, name) for name in SETS})
    with sdpa_kernel(SDPBackend.MATH):
        progress = train(model, settings, denoising_loss(model, tokenizer, choose, settings.batch, even=True))
    logger.info("details: %d samples", progress.samples)


def denoiser_settings(plan: Plan) -> Settings:
    """The first stage's."""
    return plan.settings("denoiser", 24, 1e-3)


def details_settings(plan: Plan) -> Settings:
    """The second stage's: a new, lower learning rate that decays once more."""
    return plan.settings("details", 32, 6e-4)


def build_decoder(plan: Plan) -> None:
    """Widen the decoder and train it further on frozen latents."""
    vae, pictures, cache = trained_autoencoder(plan), _pictures(plan), plan.work / "picture_latents.safetensors"
    if not cache.exists():
        _write(cache, {"latents": encode(vae, pictures)})
    settings = plan.settings("decoder", 16, 4e-4, ema_decay=0.998, hold=0.2)
    progress = train_decoder(widened(vae), pictures, load_file(cache)["latents"], settings)
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
    Loop(model, details_settings(plan)).use_average()
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
        write_sheet(pipeline, folder / "samples.png", min(84, plan.prompts))
        write_card(figures, folder / "README.md")
    logger.info("base: %s", figures["plain prompts"])


STAGES: dict[str, Callable[[Plan], None]] = {
    "autoencoder": build_autoencoder,
    "latents": build_latents,
    "denoiser": build_denoiser,
    "details": build_details,
    "decoder": build_decoder,
    "checker": build_checker,
    "assemble": build_base,
}
# Stages whose loop shares its work among the workers; the first worker does the others alone.
SHARED = ("autoencoder", "latents", "denoiser", "details")


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
    vae = widened(trained_autoencoder(plan))
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
    parser = argparse.ArgumentParser(
        "python -m finetune.demo.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="receives base/ and checker.safetensors")
    parser.add_argument("--work", type=Path, help="state of the stages; default: OUT/work")
    parser.add_argument("--minutes", type=float, default=150.0, help="for all training stages together")
    parser.add_argument("--pictures", type=int, help="drawn for the autoencoder; default: what the minutes can use")
    parser.add_argument("--prompts", type=int, help="of every kind, for the card; default: 240, fewer in short builds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "WORLD_SIZE" in os.environ:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", timeout=timedelta(hours=2))
    pictures = asked.pictures or max(400, min(Plan.pictures, int(270 * asked.minutes)))
    prompts = asked.prompts or max(24, min(Plan.prompts, int(4 * asked.minutes)))
    plan = Plan(asked.out, asked.work or asked.out / "work", asked.minutes, pictures, prompts, asked.seeds)
    build(plan, tuple(asked.only))


if __name__ == "__main__":
    main()
