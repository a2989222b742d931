"""Control pictures out of ordinary ones, as the published ControlNets were trained on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

LOW, HIGH = 100, 200
"""Gradients above HIGH are edges, those above LOW if they touch one; the usual values for ControlNets."""
SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
FLAT, STEEP = np.tan(np.pi / 8), np.tan(3 * np.pi / 8)
"""Slopes between which a gradient runs along a diagonal."""


def canny(picture: Image.Image) -> Image.Image:
    """White edges of one pixel on black.

    Source: Canny 1986, A Computational Approach to Edge Detection, without the blur and with |dx| + |dy| for the length
    of a gradient, as in OpenCV, whose edges ControlNets were trained on.
    """
    levels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()
    padded = functional.pad(levels[:, None], (1, 1, 1, 1), mode="replicate")
    across = functional.conv2d(padded, SOBEL[None, None])[:, 0]
    down = functional.conv2d(padded, SOBEL.T[None, None])[:, 0]
    # keep: each pixel's gradient is that of the channel in which it is longest.
    channel = (across.abs() + down.abs()).argmax(0, keepdim=True)
    dx, dy = across.gather(0, channel)[0], down.gather(0, channel)[0]
    length = dx.abs() + dy.abs()
    ridge = _is_ridge(length, dx, dy)
    edges = _connected(ridge & (length > LOW), ridge & (length > HIGH))
    return Image.fromarray((edges.numpy() * 255).astype(np.uint8)).convert("RGB")


def _is_ridge(length: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Where the gradient is longer than at both neighbours across the edge."""
    around = functional.pad(length, (1, 1, 1, 1))
    height, width = length.shape

    def neighbour(row: int, column: int) -> Tensor:
        return around[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    flat, steep = dy.abs() < FLAT * dx.abs(), dy.abs() > STEEP * dx.abs()
    falling = (dx * dy) < 0
    across = (length > neighbour(0, -1)) & (length >= neighbour(0, 1))
    down = (length > neighbour(-1, 0)) & (length >= neighbour(1, 0))
    slash = (length > neighbour(-1, 1)) & (length > neighbour(1, -1))
    backslash = (length > neighbour(-1, -1)) & (length > neighbour(1, 1))
    return torch.where(flat, across, torch.where(steep, down, torch.where(falling, slash, backslash)))


def _connected(weak: Tensor, strong: Tensor) -> Tensor:
    """The weak pixels that hang together with a strong one, corners included."""
    while True:
        grown = (functional.max_pool2d(strong[None].float(), 3, 1, 1)[0] > 0) & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown


PREPARATIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType({"canny": canny})
"""Name before the colon in `--control canny:photo.jpg` -> what makes the control picture, at the size that is drawn."""
