"""Peak memory of loading a full-size single file, against the file's size; ours and diffusers' `from_single_file`.

    python -m benchmarks.loading sd1 --folder /tmp/loading

The file is made on the spot: every tensor of the published shape, in fp16, filled with one repeated block of noise.
Each reading runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

BLOCK = 1 << 24


def write_file(name: str, path: Path) -> None:
    """A whole checkpoint of a shipped configuration, in fp16."""
    from finetune.families import FAMILIES
    from finetune.families.original_keys import config_of
    from finetune.families.skeleton import empty_network, shipped
    from finetune.families.text import canonical

    shape = shipped(name)
    family = next(family for family in FAMILIES.values() if name in family.skeletons)
    header, position = {}, 0
    for component, layout in family.original.items():
        with torch.device("meta"):
            module = empty_network(shape.networks[component])
        rows: dict[str, list[int]] = {}
        for own, tensor in module.state_dict().items():
            place = layout.naming(canonical(module, component, own), config_of(module))
            stored = list(tensor.shape[::-1] if place.form == "transposed" else tensor.shape)
            known = rows.setdefault(layout.prefixes[0] + place.name, [0, *stored[1:]])
            known[0] += stored[0]
        for key, stored in rows.items():
            size = 2 * torch.Size(stored).numel()
            header[key] = {"dtype": "F16", "shape": stored, "data_offsets": [position, position + size]}
            position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, len(block)):
            file.write(block[: min(len(block), position - start)])


def read_ours(path: Path, config: Path, dtype: torch.dtype) -> None:
    """Through this package."""
    from finetune.families import load_family

    load_family(str(path), dtype=dtype)


def read_diffusers(path: Path, config: Path, dtype: torch.dtype) -> None:
    """Through diffusers, with a local configuration and the autoencoder in fp32, as ours."""
    import diffusers

    index = json.loads((config / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    pipeline = kind.from_single_file(str(path), config=str(config), local_files_only=True, torch_dtype=dtype)
    pipeline.vae.float()


READERS = {"ours": read_ours, "diffusers": read_diffusers}


def write_config(name: str, folder: Path) -> Path:
    """The shipped configuration as the diffusers folder that `from_single_file` wants."""
    from finetune.families.skeleton import shipped, tokenizer

    shape = shipped(name)
    index = dict(shape.pipeline)
    for part, config in shape.networks.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        library = "diffusers" if "_class_name" in config else "transformers"
        index[part] = [library, config.get("_class_name") or config["architectures"][0]]
    for part, what in shape.tokenizers.items():
        target = part.replace("text_encoder", "tokenizer")
        tokenizer(what, part).save_pretrained(folder / target)
        index[target] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(shape.scheduler))
    index["scheduler"] = ["diffusers", shape.scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def measure(name: str, folder: Path) -> None:
    """Write the file, read it both ways in half precision, print peaks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    write_config(name, folder / f"{name}-config")
    if not path.exists():
        write_file(name, path)
    size = path.stat().st_size / 2**30
    print(f"{name}: a file of {size:.2f} GiB")
    for reader in ("nothing", *READERS):
        command = [sys.executable, "-m", "benchmarks.loading", name, "--folder", str(folder), "--reader", reader]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = map(float, done.stdout.split()[-2:])
        print(f"  {reader:10} peak {peak:.2f} GiB ({peak / size:.2f} of the file), {seconds:.1f} s")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a shipped configuration, e.g. sd1 or sdxl")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--reader")
    asked = parser.parse_args()
    if asked.reader is None:
        measure(asked.name, asked.folder)
        return
    import diffusers
    import transformers  # noqa: F401 - what both readers import is not charged to either

    _ = (diffusers.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel)
    started = time.perf_counter()
    if asked.reader in READERS:
        path, config = asked.folder / f"{asked.name}.safetensors", asked.folder / f"{asked.name}-config"
        READERS[asked.reader](path, config, torch.float16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(time.perf_counter() - started, peak)


if __name__ == "__main__":
    main()
