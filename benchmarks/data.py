"""How fast pictures become tensors, against the bare decoder and the loaders of other trainers.

    OMP_NUM_THREADS=1 python benchmarks/data.py                  # every part, a few minutes on two cores
    OMP_NUM_THREADS=1 python benchmarks/data.py --part epoch     # one of: decode, scan, epoch, cache, collate

Every part prints JSON lines. Ratios are medians over turns in which all sides work on the same files in alternation,
with as many threads or workers as there are cores; above 1 means that ours is faster. Ours ends in fp32 tensors of
[-1, 1], as the loaders do; the bare decoder in decoded pixels of the file's own size. The loader of sd-scripts needs
OpenCV (`pip install opencv-python-headless`) and is left out without.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_tools.buckets import assign
from finetune.data.batch import Collator, Variation
from finetune.data.cache import Filling, LatentCache, TextCache
from finetune.data.dataset import Cut, Picture, load_pictures
from finetune.data.fill import Recipe, fill
from finetune.data.pixels import pixel_values, to_values
from finetune.data.sampler import Draw, Item, Sampler
from finetune.data.store import Store
from finetune.data.views import plain
from finetune.families.base import Latents
from finetune.storage import sha256_file

CORES = len(os.sched_getaffinity(0))
WHITE = (255, 255, 255)
SDXL_LATENTS = (4, 128, 128)


def main() -> None:
    """Read the command line, measure, print one JSON line per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], help="only this one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000, help="pictures of the part `scan`")
    options = parser.parse_args()
    for name in [options.part] if options.part else PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            # keep: what scans remember belongs to this measurement, not to the user's cache.
            os.environ["FINETUNE_CACHE"] = str(Path(scratch) / "memory")
            PARTS[name](Path(scratch), options)


def decode(folder: Path, options: argparse.Namespace) -> None:
    """JPEG files to training size: the bare decoder, loaders as other trainers have them, and ours."""
    loaders = {name: resize for name, (resize, library) in PEERS.items() if find_spec(library)}
    for megapixels, size, resolution in ((3, (2048, 1536), 1024), (12, (4032, 3024), 1024), (12, (4032, 3024), 512)):
        paths = photos(folder / f"{megapixels}", size, 8 * CORES)
        pictures = [settled(path, size, resolution) for path in paths]
        sides: dict[str, Callable[[], object]] = {
            "ours": partial(in_threads, as_training, pictures),
            "bare_decoder": partial(in_threads, only_decode, paths),
            **{name: partial(as_peers, pictures, resize) for name, resize in loaders.items()},
        }
        took: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.turns):
            for name, work in sides.items():
                took[name].append(seconds(work))
        say(
            "decode", jpeg=f"{megapixels} MP", bucket=resolution, cores=CORES,
            pictures_per_second={name: round(len(paths) / statistics.median(times), 1) for name, times in took.items()},
            ours_over={name: ratio(took[name], took["ours"]) for name in sides if name != "ours"},
        )  # fmt: skip


def scan(folder: Path, options: argparse.Namespace) -> None:
    """The start of a run on a folder that was scanned before, and one that was not."""
    pictures = folder / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for i in range(options.rows):
        part = pictures / f"{i // 1000:03d}"
        part.mkdir(exist_ok=True)
        noise = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(part / f"{i:06d}.png", compress_level=1)
    rows = ({"file_name": f"{i // 1000:03d}/{i:06d}.png", "text": f"picture {i}"} for i in range(options.rows))
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut = Cut(64, 8, True, WHITE)
    first = seconds(lambda: load_pictures(pictures, cut))
    before = memory()
    again = seconds(lambda: load_pictures(pictures, cut))
    say("scan", rows=options.rows, first_seconds=round(first, 1), again_seconds=round(again, 1),
        memory_growth_mb=round(memory() - before))  # fmt: skip


def epoch(folder: Path, options: argparse.Namespace) -> None:
    """What it takes to begin an epoch of a million pictures, and to find the place of a resumed run."""
    buckets = [(1024, 1024), (896, 1152), (1152, 896), (768, 1344), (1344, 768)]
    for share in (0, 2):
        items = [Item(buckets[i % 5], 1, bool(share) and i % share == 0) for i in range(1_000_000)]
        sampler = Sampler(items, 8, 0)
        starts = [seconds(partial(sampler.plan_epoch, e)) for e in range(options.turns)]
        before = memory()
        for e in range(10, 20):
            sampler.plan_epoch(e)
        resumed = seconds(partial(sampler.step, 5_000_000, 1))
        say("epoch", pictures=len(items), class_pictures=sum(i.is_class for i in items),
            start_seconds=round(statistics.median(starts), 3), memory_growth_in_ten_epochs_mb=round(memory() - before),
            resume_in_epoch_40_seconds=round(resumed, 2))  # fmt: skip


def cache(folder: Path, options: argparse.Namespace) -> None:
    """Writing, finding and reading entries of the size of SDXL latents, without an encoder."""
    count = 512
    tensor = torch.randn(SDXL_LATENTS, generator=torch.Generator().manual_seed(0))
    recipe: Recipe[int, int] = Recipe(
        "numbers", lambda i: f"{i:040x}", lambda i: "", lambda i: i,
        lambda batch, _: [{"mean": tensor, "std": tensor} for _ in batch],
    )  # fmt: skip
    wrote = seconds(lambda: fill(Store(folder), range(count), recipe, 8))
    store = Store(folder)
    found = seconds(lambda: store.want([f"{i:040x}" for i in range(count)]))
    read = seconds(lambda: [store.get(f"{i:040x}") for i in range(count)])
    shards = list(folder.glob("shard-*"))
    say("cache", entries=count, megabytes=round(sum(s.stat().st_size for s in shards) / 1e6), files=len(shards),
        write_entries_per_second=round(count / wrote), find_seconds=round(found, 3),
        read_milliseconds_per_entry=round(read / count * 1000, 3))  # fmt: skip


def collate(folder: Path, options: argparse.Namespace) -> None:
    """The time between two steps: batches of SDXL's size, and of the embedded base's."""
    for name, resolution, latent, width in (("demo", 64, (4, 8, 8), 64), ("SDXL", 1024, SDXL_LATENTS, 2048)):
        part = folder / name
        pictures = [settled(path, (resolution, resolution), resolution)
                    for path in photos(part, (resolution, resolution), 8)]  # fmt: skip
        latents = LatentCache(part, name, WHITE)

        def encode(pixels: Tensor, shape: tuple[int, int, int] = latent) -> Latents:
            return Latents(torch.zeros(len(pixels), *shape), torch.ones(len(pixels), *shape))

        latents.prepare([plain(p) for p in pictures], encode, Filling(8))
        text = TextCache(part, name, lambda captions: {"ids": torch.zeros(len(captions), 77, dtype=torch.long)})
        text.prepare([""], lambda tokens, w=width: {"states": torch.zeros(len(tokens["ids"]), 77, w)}, Filling(8))
        collator = Collator(pictures, latents, text, Variation(), seed=0)
        times = [seconds(partial(collator.step, s, [[Draw(i, s, 0) for i in range(4)]], 0, 1)) for s in range(50)]
        say("collate", base=name, batch=4, milliseconds=round(statistics.median(times) * 1000, 2))


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "decode": decode, "scan": scan, "epoch": epoch, "cache": cache, "collate": collate,
}  # fmt: skip


def photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """JPEG files with the detail of photographs: waves, edges and noise; `size` is (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = [folder / f"{i:03d}.jpg" for i in range(count)]
    x, y = np.meshgrid(np.linspace(0, 9, size[0], dtype=np.float32), np.linspace(0, 7, size[1], dtype=np.float32))
    for i, path in enumerate(paths):
        if not path.exists():
            waves = np.stack([np.sin(x * (i + 1) + y), np.cos(y * 3 - x), np.sign(np.sin(x * y / (i + 2)))], -1)
            noise = generator.normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
            pixels = np.clip((waves + 1) * 110 + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path, quality=90)
    return paths


def settled(path: Path, size: tuple[int, int], resolution: int) -> Picture:
    """A picture as training knows it, without a scan; `size` is (width, height)."""
    place = assign(*size, [(resolution, resolution)])
    return Picture(path, path.name, sha256_file(path), ("",), place, size[::-1], 1, 1.0, False)


def as_training(picture: Picture) -> Tensor:
    """What the cache does before it encodes: read, check, decode, cut, to values."""
    return to_values(pixel_values(plain(picture), WHITE))


def only_decode(path: Path) -> None:
    """What no loader can do without."""
    with Image.open(path) as image:
        image.load()


Size = tuple[int, int]


def by_pillow(image: Image.Image, size: Size) -> np.ndarray:
    """Lanczos, as the diffusers scripts ask of it; `size` is (width, height)."""
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def by_opencv(image: Image.Image, size: Size) -> np.ndarray:
    """Means of areas, as sd-scripts make pictures smaller."""
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    return cv2.resize(np.array(image), size, interpolation=cv2.INTER_AREA)


Resize = Callable[[Image.Image, Size], np.ndarray]
PEERS: dict[str, tuple[Resize, str]] = {"diffusers": (by_pillow, "PIL"), "sd_scripts": (by_opencv, "cv2")}
"""Whose loader, how it resizes, and the library that this needs."""


class PeersDataset(Dataset[Tensor]):
    """As other trainers have it: open, turn, convert, resize, crop, to tensor, normalise."""

    def __init__(self, pictures: list[Picture], resize: Resize) -> None:
        """Remember the pictures."""
        self.pictures, self.resize = pictures, resize

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        place = self.pictures[index].placement
        image = ImageOps.exif_transpose(Image.open(self.pictures[index].path)).convert("RGB")
        (top, left), (height, width) = place.crop_top_left, place.bucket
        array = self.resize(image, place.resize[::-1])[top : top + height, left : left + width].transpose(2, 0, 1)
        return (torch.from_numpy(array.copy()).float().div(255) - 0.5) / 0.5


def as_peers(pictures: list[Picture], resize: Resize) -> None:
    """One pass of a torch DataLoader with a worker per core."""
    for _ in DataLoader(PeersDataset(pictures, resize), batch_size=4, num_workers=CORES):
        pass


def in_threads(function: Callable[..., object], things: list) -> None:  # type: ignore[type-arg]
    """Every thing once, one thread per core."""
    with ThreadPoolExecutor(CORES) as pool:
        for _ in pool.map(function, things):
            pass


def seconds(call: Callable[[], object]) -> float:
    """Wall time."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the turns' ratios; above 1: ours is faster."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2)


def memory() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def say(part: str, **values: object) -> None:
    """One JSON line."""
    print(json.dumps({"part": part, **values}), flush=True)


if __name__ == "__main__":
    main()
