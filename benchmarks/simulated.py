"""How much memory a GPU would need for our recipes at full size, computed without one.

The recipe's own run is built on a pretended CUDA device (`tests.pretend_gpu`): real configurations, weights without
content. Our trainer encodes, takes two steps and validates, and every byte that lives on the device is counted, as
torch's allocator counts it. Not counted: what CUDA takes for itself (about half a GiB), workspaces of cuDNN and cuBLAS,
and memory that the allocator cannot use because it lies in pieces. Beside it stands what `finetune plan` predicts.

    python -m benchmarks.simulated                    all cases, about half an hour on one core
    python -m benchmarks.simulated sdxl-lora          those of that name, see CASES
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401 - before a GPU is pretended, for which it would look for another library
import torch
from PIL import Image

from finetune import load_run
from finetune.devices import on_device
from finetune.families import skeleton
from finetune.families.base import ModelFamily
from finetune.families.parts import Loaded
from finetune.families.twins.tokenizers import t5_tokenizer
from finetune.tracking import Reporter
from finetune.training import build, planning, setup
from finetune.training.loop import Loop, one_step, validate
from finetune.training.memory import CUDA_OVERHEAD
from tests.pretend_gpu import Gpu, pretend_gpu

GIB = 2**30
T4 = {"model.dtype": "fp16"}
WHOLE = {"train.gradient_checkpointing": False}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd15-lora": ("sd15-lora", "sd1", T4),
    "sd15-lora, batch 1": ("sd15-lora", "sd1", {"train.batch_size": 1}),
    "sd15-lora, batch 4, no checkpointing": ("sd15-lora", "sd1", {"train.batch_size": 4, **WHOLE}),
    "sd15-dreambooth-lora": ("sd15-dreambooth-lora", "sd1", T4 | {"data.prior": None}),
    "sdxl-lora": ("sdxl-lora", "sdxl", {}),
    "sdxl-lora, storage fp8 or int8": ("sdxl-lora", "sdxl", {"model.storage": "int8"}),
    "sdxl-lora, batch 4": ("sdxl-lora", "sdxl", {"train.batch_size": 4}),
    "sdxl-lora, no checkpointing": ("sdxl-lora", "sdxl", WHOLE),
    "flux-lora (768 px, nf4)": ("flux-lora", "flux-dev", {}),
    "flux-lora, 1024 px": ("flux-lora", "flux-dev", {"data.resolution": 1024}),
    "flux-lora, 512 px, fp16": ("flux-lora", "flux-dev", {"data.resolution": 512, **T4}),
    "flux-lora, 1024 px, storage full": ("flux-lora", "flux-dev", {"data.resolution": 1024, "model.storage": "full"}),
}
"""Name -> (recipe, shipped configuration, what differs from the recipe)."""
COMMON = {"model.variant": None, "model.dtype": "bf16", "samples.prompts": (), "validation.holdout": 0}
PICTURES = 6
SIDE = 1024


def main() -> None:
    """Measure the cases that were asked for, and print a table."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(CASES)
    print("| GiB | before the first step | a step | validation | decoding a sample | `finetune plan` |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _pictures(folder / "photos")
        for name, (recipe, shape, values) in CASES.items():
            if name in wanted:
                cells = _measured(recipe, shape, values, folder / str(len(list(folder.iterdir()))))
                print(f"| {name} | {' | '.join(f'{size / GIB:.1f}' for size in cells)} |", flush=True)


def _measured(recipe: str, shape: str, values: Mapping[str, Any], folder: Path) -> list[int]:
    """Peak bytes of all before the first step, of a step, of validation, of decoding a picture; and the plan's."""
    folder.mkdir()
    base = folder / f"{shape}.safetensors"
    base.touch()
    own = {"data.folder": folder.parent / "photos", "output_dir": folder / "run", "model.base": str(base)}
    run = load_run(recipe, values={**COMMON, **own, **values})
    with mock.patch("finetune.families.originals.load", _without_content):
        with pretend_gpu(bf16=run.model.dtype == "bf16", content=False, memory=96 * GIB) as gpu:
            accelerator, dtype = build.build_accelerator(run.model.dtype, ())
            loop, _ = setup.build_loop(run, accelerator, dtype, Reporter(), fresh=True)
            peaks = [gpu.peak, *_trained(loop, gpu)]
            del loop
        with pretend_gpu(content=False):
            loaded = setup.load(run, dtype, Reporter(), fresh=True)
    rows = dict(planning.memory_rows(run, loaded, torch.device("meta"), 0))
    number, unit = rows["Together"].split()
    assert unit == "GiB"
    return [*peaks, int(float(number) * GIB) - CUDA_OVERHEAD]


def _trained(loop: Loop, gpu: Gpu) -> list[int]:
    """Peaks of the second step, whose optimizer has its state, of validation, and of one decoded picture."""
    loop.model.train()
    one_step(loop, 0, 1.0)
    gpu.restart()
    one_step(loop, 1, 1.0)
    peaks = [gpu.peak]
    gpu.restart()
    validate(loop)
    peaks.append(gpu.peak)
    gpu.restart()
    vae, side = loop.components.vae, SIDE if loop.family.resolution == SIDE else 512
    assert vae is not None
    places = side // loop.family.vae_stride(vae)
    with torch.no_grad(), on_device([vae], loop.accelerator.device):
        loop.family.decode_latents(vae, torch.zeros(1, int(vae.config.latent_channels), places, places, device="cuda"))
    return [*peaks, gpu.peak]


def _without_content(families: Mapping[str, ModelFamily], path: Path, dtype: torch.dtype, choices: object) -> Loaded:
    """In the place of reading a file: the networks of the shipped configuration that it is named after."""
    family = next(family for family in families.values() if path.stem in family.skeletons)
    shape = skeleton.shipped(path.stem)
    networks = {
        part: skeleton.empty_network(config).to("meta", torch.float32 if part == "vae" else dtype)
        for part, config in shape.networks.items()
    }
    tokenizers = {
        part: skeleton.tokenizer(what, part) if isinstance(what, dict) and what["kind"] == "clip" else t5_tokenizer()
        for part, what in shape.tokenizers.items()
    }
    digests = dict.fromkeys(networks, path.stem)
    return Loaded(family, networks, shape.networks, tokenizers, shape.scheduler, shape.pipeline, digests)


def _pictures(folder: Path) -> None:
    folder.mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (SIDE, SIDE), (40 * number, 80, 160)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of sks dog, <my-dog>, {number}")


if __name__ == "__main__":
    main()
