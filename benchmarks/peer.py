"""A whole run of ours against a whole run of diffusers' own LoRA script: from a folder of pictures to a file.

    python -m benchmarks.peer DIFFUSERS/examples/text_to_image/train_text_to_image_lora.py
    python -m benchmarks.peer SCRIPT --full          # SD1.5's real UNet with random weights, minutes

The script comes from a checkout of diffusers, is not changed, and needs `datasets` and `torchvision`. Both sides train
a LoRA of rank 8 on the attention layers with AdamW in fp32, on the same base, pictures, captions, batch and steps, each
in a process of its own, in turns; the median of the turns counts. A step's processor seconds are read between calls of
the optimizer, without the first ones; "whole" is the processor time of the process with imports, caching and saving.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.step_overhead import random_sd15
from finetune import load_family

PICTURES = 64
WARM_UP = 3


@dataclass(frozen=True)
class Cost:
    """What one run cost: processor seconds of a step and of everything, and the most memory it held, in GiB."""

    step: float
    whole: float
    peak: float


def main() -> None:
    """Parse the command line, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="train_text_to_image_lora.py of a checkout of diffusers")
    parser.add_argument("--full", action="store_true", help="SD1.5's real UNet, random weights, 128 px, batch 1")
    parser.add_argument("--steps", type=int, default=None, help="steps of a run (60; 8 with --full)")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    steps = options.steps or (8 if options.full else 60)
    resolution, batch_size = (128, 1) if options.full else (64, 8)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = random_sd15(folder / "base") if options.full else demo_folder(folder / "base")
        pictures = write_pictures(folder / "pictures", 2 * resolution)
        ours, theirs = [], []
        for turn in range(options.turns):
            out = folder / f"turn-{turn}"
            theirs.append(measured(peer_command(options.script, base, pictures, resolution, batch_size, steps, out)))
            ours.append(measured(our_command(base, pictures, resolution, batch_size, steps, out)))
            print(json.dumps({"turn": turn + 1, "ours": asdict(ours[-1]), "peer": asdict(theirs[-1])}), flush=True)
    ratios = {
        f"peer_{what}_divided_by_ours": round(
            statistics.median(getattr(t, what) / getattr(o, what) for t, o in zip(theirs, ours, strict=True)), 3
        )
        for what in ("step", "whole", "peak")
    }
    print(json.dumps({"base": "SD1.5 UNet, random weights" if options.full else "embedded base",
                      "threads": torch.get_num_threads(), "steps": steps, **ratios}))  # fmt: skip


def measured(command: list[str]) -> Cost:
    """Run `command`, a script or module with its arguments, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        done = subprocess.run(
            [sys.executable, "-c", "from benchmarks.peer import child; child()", str(report), *command],
            check=False, cwd=Path(__file__).parents[1], env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return Cost(**json.loads(report.read_text()))


def child() -> None:
    """In the measured process: run what stands behind the report's name, then write the report."""
    report, what, *arguments = sys.argv[1:]
    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.process_time()))
    sys.argv = [what, *arguments]
    try:
        (runpy.run_path if what.endswith(".py") else runpy.run_module)(what, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
    gaps = [after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    cost = Cost(step=statistics.median(gaps), whole=time.process_time(), peak=peak)
    Path(report).write_text(json.dumps(asdict(cost)))


def peer_command(
    script: Path, base: Path, pictures: Path, resolution: int, batch_size: int, steps: int, out: Path
) -> list[str]:
    """Diffusers' script with the same work; a fixed crop, so that nothing but its own habits differs."""
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": base, "train_data_dir": pictures, "caption_column": "text",
        "resolution": resolution, "train_batch_size": batch_size, "max_train_steps": steps, "learning_rate": 1e-4,
        "lr_scheduler": "constant", "rank": 8, "seed": 0, "output_dir": f"{out}-peer", "checkpointing_steps": 10**9,
    }  # fmt: skip
    return [str(script), "--center_crop", *(f"--{name}={value}" for name, value in settings.items())]


def our_command(base: Path, pictures: Path, resolution: int, batch_size: int, steps: int, out: Path) -> list[str]:
    """`finetune train` with the same work, nothing cached before."""
    document = {
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {"folder": str(pictures), "resolution": resolution},
        "adapter": {"rank": 8},
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "schedule": "constant"},
        "train": {"steps": steps, "batch_size": batch_size, "gradient_checkpointing": False},
        "validation": {"every": 0},
        "checkpoint": {"every": 10**9},
        "output_dir": f"{out}-ours",
    }
    file = Path(f"{out}.yaml")
    file.write_text(yaml.safe_dump(document))
    return ["finetune", "train", str(file)]


def demo_folder(folder: Path) -> Path:
    """The embedded base as a diffusers folder."""
    _, parts = load_family("demo")
    StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoders["text_encoder"], tokenizer=parts.tokenizers["text_encoder"],
        unet=parts.denoiser, scheduler=DDPMScheduler.from_config(parts.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_pictures(folder: Path, side: int) -> Path:
    """JPEG pictures with captions, as an imagefolder that both sides read."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as rows:
        for i in range(PICTURES):
            small = Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)
            rows.write(json.dumps({"file_name": f"{i}.jpg", "text": f"a picture of thing {i}"}) + "\n")
    return folder


if __name__ == "__main__":
    main()
