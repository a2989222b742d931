"""Peak memory and time of putting an adapter into a full-size checkpoint, of exporting a run of one, and of taking
an adapter out of two.

    python -m benchmarks.merging sd1 --folder /tmp/merging

The base is a single file of the published shapes in fp16, filled with noise (see `benchmarks.loading`); the adapter is
a LoRA of rank 16 on every attention layer of the denoiser. Each command runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from benchmarks.loading import write_file
from finetune.families import load_family
from finetune.interchange.adapter import Adapter, Update
from finetune.interchange.conversion import write
from finetune.interchange.names import published
from finetune.rng import rng
from finetune.run_files import ADAPTER_FILE

RANK = 16


def adapter_for(name: str) -> Adapter:
    """A LoRA on the attention layers of a published model, strong enough for half precision."""
    architecture = next(table for table in published() if table.name == name)
    updates = {}
    for number, (module, shape) in enumerate(sorted(architecture.networks["unet"].layers.items())):
        if ".to_" in module:
            draw = rng(0, "benchmark", number)
            down, up = torch.randn(RANK, shape[1], generator=draw), torch.randn(shape[0], RANK, generator=draw)
            tensors = {"lora_A.weight": down, "lora_B.weight": up}
            updates["unet", module] = Update("lora", tensors, 1 / RANK, shape=shape)
    return Adapter(updates, architecture)


def write_run(name: str, base: Path, folder: Path) -> None:
    """A finished run on the base, as `finetune train` leaves it."""
    _, components = load_family(str(base), dtype=None)
    adapter = adapter_for(name)
    adapter.metadata |= {"finetune.base": base.name, "finetune.base_digest": components.digest}
    write(adapter, folder / ADAPTER_FILE, to="ours")
    run = {"model": {"base": str(base)}, "data": {"folder": str(folder)}, "output_dir": str(folder)}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


def measured(arguments: list[str]) -> tuple[float, float]:
    """(seconds, GiB at the peak) of a `finetune` command in a process of its own."""
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "finetune", *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    assert status == 0, f"finetune {' '.join(arguments)} failed"
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    """One line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["sd1", "sdxl"])
    parser.add_argument("--folder", type=Path, required=True, help="needs room for two checkpoints; emptied at the end")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    base, adapter, merged = (str(folder / f"{part}.safetensors") for part in ("base", "adapter", "merged"))
    try:
        write_file(options.name, Path(base))
        write(adapter_for(options.name), Path(adapter), to="kohya", dtype="fp16")
        # keep: in a process of its own, for what this one has held counts as its children's peak.
        writer = multiprocessing.get_context("spawn").Process(target=write_run, args=(options.name, Path(base), folder))
        writer.start()
        writer.join()
        exported = str(folder / "exported")
        commands = {
            **{
                f"export -f {form} --dtype fp16": ["export", str(folder), "-f", form, "--dtype", "fp16", "-o", exported]
                for form in ("kohya", "single-file", "merged")
            },
            "merge --into": ["merge", adapter, "--into", base, "-o", merged],
            "extract": ["extract", merged, base, str(folder / "extracted.safetensors"), "--rank", str(RANK)],
        }
        size = Path(base).stat().st_size / 2**30
        for name, arguments in commands.items():
            seconds, peak = measured(arguments)
            sys.stdout.write(f"{name}: {size:.2f} GiB file, {peak:.2f} GiB at the peak, {seconds:.0f} s\n")
            sys.stdout.flush()
            shutil.rmtree(exported, ignore_errors=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
