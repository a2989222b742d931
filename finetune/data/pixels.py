"""From a picture file to what an encoder reads: decoded, cut, coloured, mirrored; and masks the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from data_tools.buckets import Placement
from data_tools.errors import RefusedError
from data_tools.files import read_regular
from data_tools.fingerprints import sha256
from data_tools.images import BLACK, DECODER, MAX_FILE_BYTES, decode, opacity
from finetune.data.dataset import Colour, Picture
from finetune.data.views import Jitter, View
from finetune.errors import DataError

DRAFT = 1.4
"""A JPEG is decoded at a half, a quarter or an eighth of its size while that is this many times what is needed; Lanczos
does the rest. The result differs from the full decoder's by about one level of 255 (root mean square)."""


def _torch_has_lanczos() -> bool:
    """Torch resizes bytes five times faster than Pillow, to the same values but for a level; 2.13 has Lanczos.

    Older versions say that they have no such mode; which resizer is used is part of every cache key (`VERSION`).
    """
    try:
        _lanczos(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2))
    except (RuntimeError, ValueError):
        return False
    return True


def _lanczos(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(pixels, size, mode="lanczos", antialias=True)


TORCH_LANCZOS = _torch_has_lanczos()
VERSION = f"3 decoder {DECODER} Pillow {PIL.__version__} draft {DRAFT} {'torch' if TORCH_LANCZOS else 'Pillow'} Lanczos"
"""Part of every cache key: changes when the same file and cut would give other pixels."""


def pixel_values(view: View, background: Colour) -> Tensor:
    """A view's pixels, shape (3, H, W), uint8; `to_values` turns a batch of them into what autoencoders read.

    Raises:
        DataError: if the file is gone, or is not the one that was scanned.
    """
    picture = view.picture
    data = _bytes_of(picture.path, picture.sha256, picture)
    try:
        image, _ = decode(data, background, shrink=picture.size[0] / view.placement.resize[0] / DRAFT)
    except RefusedError as refusal:
        raise DataError("A picture cannot be used:", [str(refusal.problem(picture.path.name))]) from refusal
    pixels = cut(image, view.placement)
    if view.jitter is not None:
        pixels = _pixels(_coloured(Image.fromarray(pixels.permute(1, 2, 0).numpy()), view.jitter))
    return pixels.flip(-1) if view.mirrored else pixels


def to_values(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape as fp32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def mask_values(view: View, stride: int) -> Tensor:
    """How much each latent of a view counts: the mask's mean over the latent's pixels, shape (1, h, w), in [0, 1].

    Args:
        stride: pixels per latent along one side.
    """
    values: Tensor = torch.nn.functional.avg_pool2d(mask_pixels(view)[None].float() / 255, stride)[0]
    return values


def mask_pixels(view: View) -> Tensor:
    """The mask of a view, cut and mirrored as its picture, shape (1, H, W), uint8."""
    mask = view.picture.mask
    assert mask is not None, "only pictures with a mask are asked for it"
    data = _bytes_of(mask.path, mask.sha256, view.picture)
    grey = opacity(data) if mask.is_alpha else decode(data, BLACK)[0].convert("L")
    pixels = cut(grey, view.placement)
    return pixels.flip(-1) if view.mirrored else pixels


def cut(image: Image.Image, placement: Placement) -> Tensor:
    """The bucket out of a picture, resized with Lanczos whatever its own scale; shape (channels, H, W), uint8."""
    (height, width), (top, left) = placement.bucket, placement.crop_top_left
    if image.size == placement.resize[::-1]:
        return _pixels(image)[:, top : top + height, left : left + width]
    # keep: of a zoomed picture most is cut away, and torch would resize all of it.
    if TORCH_LANCZOS and not placement.zoomed:
        return _lanczos(_pixels(image)[None], placement.resize)[0, :, top : top + height, left : left + width]
    down, across = image.height / placement.resize[0], image.width / placement.resize[1]
    box = (
        left * across,
        top * down,
        min((left + width) * across, image.width),
        min((top + height) * down, image.height),
    )
    return _pixels(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _pixels(image: Image.Image) -> Tensor:
    """An RGB or L picture as uint8 of shape (channels, H, W), channels last in memory."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _coloured(image: Image.Image, jitter: Jitter) -> Image.Image:
    steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhance, factor in zip(steps, jitter, strict=True):
        image = enhance(image).enhance(factor)
    return image


def _bytes_of(path: Path, digest: str, picture: Picture) -> bytes:
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except RefusedError as refusal:
        raise DataError("A picture cannot be used:", [str(refusal.problem(path.name))]) from refusal
    if sha256(data) != digest:
        raise DataError(
            f"{path.name} ({picture.key}) was changed while the run was being prepared; start the command again."
        )
    return data
