"""What our trainer costs on top of the work itself: our steps per second divided by those of a hand-written loop.

Both train the same LoRA on the same base with cached latents and captions, the same number format, optimizer and batch,
in one process, in turns; the median of the turns counts. The hand-written loop does only what every trainer must:
noise, forward, backward, clip, step. Ours is the real `finetune.train`, with its keyed draws, checks and log.

    python benchmarks/step_overhead.py                     the embedded base
    python benchmarks/step_overhead.py --full              SD1.5's real UNet with random weights (4 GB on disk, minutes)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from finetune import load_family, make_run, train
from finetune.config import Run
from finetune.tracking import read_metrics

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


def main() -> None:
    """Parse the command line, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="SD1.5's real UNet, random weights, 128 px, batch 1")
    parser.add_argument("--steps", type=int, default=None, help="steps per turn (40; 4 with --full)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--optimizer", default="adamw8bit", choices=["adamw", "adamw8bit"])
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, where others use the CPU too")
    options = parser.parse_args()
    if options.cpu_time:
        time.perf_counter = time.process_time
    steps = options.steps or (4 if options.full else 40)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, resolution, batch_size = ("demo", 64, 8)
        if options.full:
            base, resolution, batch_size = str(random_sd15(folder / "sd15")), 128, 1
        # keep: all of one size, so that every step of ours holds a full batch as every hand-written one does.
        write_noise_pictures(folder / "pictures", resolution)
        ours, raw = [], []
        for turn in range(options.turns):
            run = make_document(base, folder, resolution, batch_size, steps, options.optimizer, turn)
            ours.append(our_seconds_per_step(run))
            raw.append(raw_seconds_per_step(run, resolution, device))
            print(f"turn {turn + 1}: ours {ours[-1]:.4f} s/step, hand-written {raw[-1]:.4f} s/step", flush=True)
    ratio = statistics.median(r / o for r, o in zip(raw, ours, strict=True))
    print(
        json.dumps(
            {
                "base": "SD1.5 UNet, random weights" if options.full else "embedded base",
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "optimizer": options.optimizer,
                "clock": "processor" if options.cpu_time else "wall",
                "ours_steps_per_second": round(1 / statistics.median(ours), 3),
                "raw_steps_per_second": round(1 / statistics.median(raw), 3),
                "ours_divided_by_raw": round(ratio, 3),
            }
        )
    )


def make_document(
    base: str, folder: Path, resolution: int, batch_size: int, steps: int, optimizer: str, turn: int
) -> Run:
    """One run: LoRA rank 8 on the attention layers, everything else off."""
    return make_run(
        {
            "model": {"base": base, "dtype": "fp32"},
            "data": {"folder": str(folder / "pictures"), "resolution": resolution, "upscale": True,
                     "cache_folder": str(folder / "cache")},
            "adapter": {"rank": 8},
            "optimizer": {"name": optimizer, "schedule": "constant"},
            # the first reading is warm-up and not counted
            "train": {"steps": steps + warm_up(steps), "batch_size": batch_size, "gradient_checkpointing": False,
                      "log_every": warm_up(steps), "trackers": []},
            "validation": {"every": 0},
            "checkpoint": {"every": 10**9},
            "output_dir": str(folder / f"run-{turn}"),
        }
    )  # fmt: skip


def warm_up(steps: int) -> int:
    """Steps that are not counted, and between two readings: ten, as a run's default, where there are enough."""
    return 10 if steps >= 20 else 2


def our_seconds_per_step(run: Run) -> float:
    """Wall seconds per step of the real trainer, without its warm-up."""
    train(run)
    lines = read_metrics(run.output_dir / "metrics.jsonl")[1:]
    return statistics.mean(line["seconds_per_step"] for line in lines)


def raw_seconds_per_step(run: Run, resolution: int, device: torch.device) -> float:
    """Wall seconds per step of the loop anybody would write, without its warm-up."""
    _, parts = load_family(run.model.base)
    unet: Any = parts.denoiser.to(device)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION)
    inject_adapter_in_model(config, unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.optimizer.name, trained)
    vae: Any = parts.vae
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    side = resolution // stride
    generator = torch.Generator().manual_seed(0)
    shape = (run.train.batch_size, vae.config.latent_channels, side, side)
    latents = torch.randn(shape, generator=generator).to(device)
    length = parts.tokenizers["text_encoder"].model_max_length
    text = torch.randn((shape[0], length, unet.config.cross_attention_dim), generator=generator).to(device)
    scheduler = DDPMScheduler.from_config(parts.scheduler_config)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    unet.train()
    started = 0.0
    for step in range(run.train.steps):
        if step == run.train.log_every:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        noise = torch.randn(shape, generator=generator).to(device)
        timesteps = torch.randint(0, 1000, (shape[0],), generator=generator).to(device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
        loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, encoder_hidden_states=text).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / (run.train.steps - run.train.log_every)


def make_optimizer(name: str, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer the run names, straight from its library."""
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trained, lr=1e-4, min_8bit_size=1024)  # type: ignore[no-any-return]


def write_noise_pictures(folder: Path, side: int) -> None:
    """Eight captioned pictures; what they show does not matter here."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a picture\n")


def random_sd15(folder: Path) -> Path:
    """A pipeline folder with SD1.5's real UNet and random weights; the other parts are small."""
    _, demo = load_family("demo")
    with torch.device("cpu"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
        )
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12,
            vocab_size=len(demo.tokenizers["text_encoder"]),
            max_position_embeddings=demo.tokenizers["text_encoder"].model_max_length,
        )  # fmt: skip
        text_encoder = CLIPTextModel(config)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=demo.tokenizers["text_encoder"], unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


if __name__ == "__main__":
    main()
