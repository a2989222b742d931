"""What is encoded once: pictures as latent mean and deviation, captions as conditioning. Addressed by content.

An entry's name is a digest of everything that decides its value (file bytes, cut, mirror, encoder weights), so an
edited picture or another autoencoder is a new entry and never a stale hit. Entries are written beside and renamed; a
damaged one is encoded again and said so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_tools import buckets, scan
from data_tools.fingerprints import sha256
from finetune.data.dataset import Colour, Picture
from finetune.errors import CheckpointError, DataError, NumericError
from finetune.families.base import Conditioning, Latents
from finetune.storage import read_safetensors, write_safetensors

VERSION = 1
"""Part of every key; counts up when the same inputs would give other values."""

Encode = Callable[[Tensor], Latents]
"""Pixel values (B, 3, H, W) in [-1, 1] -> latents."""
Describe = Callable[[list[str]], Conditioning]
"""Captions -> conditioning, batch first."""
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Entry:
    """One thing to encode: a picture, mirrored or not."""

    picture: Picture
    mirrored: bool


class LatentCache:
    """Latents of every picture, in memory once prepared, on disk for the next run."""

    def __init__(self, folder: Path, vae_digest: str, background: Colour) -> None:
        self._folder = folder / "latents"
        self._vae_digest = vae_digest
        self._background = background
        self._ready: dict[str, Latents] = {}
        self.damaged: list[Path] = []
        """Entries that could not be read and are encoded again."""

    def prepare(
        self, pictures: Sequence[Picture], *, flip: bool, encode: Encode, batch_size: int,
        progress: Progress | None = None,
    ) -> int:  # fmt: skip
        """Encode what is not on disk yet and keep everything at hand.

        Returns:
            How many entries were encoded now.

        Raises:
            NumericError: naming the picture whose latents are not finite.
        """
        entries = [Entry(p, mirrored) for p in pictures for mirrored in ((False, True) if flip else (False,))]
        missing = [e for e in entries if not self._restore(self._key(e))]
        missing.sort(key=lambda e: e.picture.placement.bucket)
        done = len(entries) - len(missing)
        for batch in _batches(missing, batch_size):
            pixels = torch.stack([pixel_values(e, self._background) for e in batch])
            latents = encode(pixels)
            for i, entry in enumerate(batch):
                self._keep(entry, Latents(latents.mean[i].float().cpu(), latents.std[i].float().cpu()))
            done += len(batch)
            if progress:
                progress(done, len(entries))
        return len(missing)

    def get(self, picture: Picture, mirrored: bool) -> Latents:
        """The latents of one picture, shapes (C, h, w)."""
        return self._ready[self._key(Entry(picture, mirrored))]

    def _key(self, entry: Entry) -> str:
        p = entry.picture.placement
        decisive = [VERSION, entry.picture.sha256, p.bucket, p.resize, p.crop_top_left, entry.mirrored,
                    self._background, self._vae_digest]  # fmt: skip
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _restore(self, key: str) -> bool:
        if key not in self._ready:
            tensors = _read_entry(self._path(key), {"mean", "std"}, self.damaged)
            if tensors is None:
                return False
            self._ready[key] = Latents(tensors["mean"], tensors["std"])
        return True

    def _keep(self, entry: Entry, latents: Latents) -> None:
        if not (torch.isfinite(latents.mean).all() and torch.isfinite(latents.std).all()):
            raise NumericError(
                f"The autoencoder gives values that are not finite for {entry.picture.path.name}; "
                "open the picture: if it looks right, the autoencoder is broken or runs in too small a number format."
            )
        key = self._key(entry)
        self._ready[key] = latents
        write_safetensors(self._path(key), {"mean": latents.mean, "std": latents.std}, {})


class TextCache:
    """The conditioning of every caption, for frozen text encoders."""

    def __init__(self, folder: Path, text_digest: str) -> None:
        self._folder = folder / "text"
        self._text_digest = text_digest
        self._ready: dict[str, Conditioning] = {}
        self.damaged: list[Path] = []
        """Entries that could not be read and are encoded again."""

    def prepare(
        self, captions: Sequence[str], *, describe: Describe, batch_size: int, progress: Progress | None = None
    ) -> int:
        """Encode the captions that are not on disk yet; how many that were."""
        unique = sorted(set(captions))
        missing = [caption for caption in unique if not self._restore(caption)]
        done = len(unique) - len(missing)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            conditioning = describe(batch)
            for i, caption in enumerate(batch):
                self._ready[caption] = {name: value[i].float().cpu() for name, value in conditioning.items()}
                if not all(torch.isfinite(value).all() for value in self._ready[caption].values()):
                    raise NumericError(f"A text encoder gives values that are not finite for the caption {caption!r}.")
                write_safetensors(self._path(caption), self._ready[caption], {})
            done += len(batch)
            if progress:
                progress(done, len(unique))
        return len(missing)

    def get(self, caption: str) -> Conditioning:
        """The conditioning of one caption, without a batch dimension."""
        return self._ready[caption]

    def _path(self, caption: str) -> Path:
        key = hashlib.sha256(json.dumps([VERSION, caption, self._text_digest]).encode()).hexdigest()
        return self._folder / f"{key}.safetensors"

    def _restore(self, caption: str) -> bool:
        if caption not in self._ready:
            tensors = _read_entry(self._path(caption), set(), self.damaged)
            if tensors is None:
                return False
            self._ready[caption] = tensors
        return True


def pixel_values(entry: Entry, background: Colour) -> Tensor:
    """A picture as the autoencoder reads it: cut to its bucket, shape (3, H, W), fp32 in [-1, 1]."""
    picture = entry.picture
    image = scan.load_image(picture.path, background=background)
    if sha256(picture.path.read_bytes()) != picture.sha256:
        raise DataError(f"{picture.path.name} was changed while the run was being prepared; start the command again.")
    image = buckets.cut(image, picture.placement)
    if entry.mirrored:
        image = ImageOps.mirror(image)
    return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as fp32 of shape (3, H, W) in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _batches(entries: Sequence[Entry], size: int) -> list[list[Entry]]:
    """Runs of at most `size` entries of one bucket; `entries` come sorted by bucket."""
    found: list[list[Entry]] = []
    for entry in entries:
        bucket = entry.picture.placement.bucket
        if found and len(found[-1]) < size and found[-1][0].picture.placement.bucket == bucket:
            found[-1].append(entry)
        else:
            found.append([entry])
    return found


def _read_entry(path: Path, names: set[str], damaged: list[Path]) -> dict[str, Tensor] | None:
    """A stored entry with at least these tensors; None when there is none, or it is damaged and was noted as such."""
    if not path.is_file():
        return None
    try:
        tensors, _ = read_safetensors(path)
    except CheckpointError:
        tensors = {}
    if not tensors or not names <= tensors.keys():
        path.unlink(missing_ok=True)
        damaged.append(path)
        return None
    # keep: tensors mapped from a file lie at odd addresses, where kernels may round differently; a copy does not.
    return {name: tensor.clone() for name, tensor in tensors.items()}
