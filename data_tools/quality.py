"""What can be measured in one picture without a model: sharpness, exposure, contrast, bars, colours.

Every measure is taken on the picture reduced to at most `SIDE` pixels on its longer side, so that one threshold
serves all sizes; small pictures are not enlarged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_tools.fingerprints import PHASH_INPUT, phash

Pixels = NDArray[np.float64]

SIDE = 512
"""Longer side of the picture that is measured, pixels."""
TILES = 4
"""Sharpness is that of the sharpest of 4 x 4 tiles: a portrait before a soft background is not blurred."""
GRID = 4
"""Colours are kept as the means of 4 x 4 fields."""
VERSION = "1"
"""Of the measures below; stored ones of another version are taken again."""


@dataclass(frozen=True, slots=True)
class Measures:
    """One picture in numbers."""

    sharpness: float
    """Variance of the Laplacian in the sharpest tile, grey levels squared: below 30 soft, above 100 crisp."""
    luma_low: float
    """Grey level that 5 % of the pixels are darker than, 0 to 255: high means nothing dark, over-exposed."""
    luma_high: float
    """Grey level that 5 % of the pixels are brighter than, 0 to 255: low means nothing bright, under-exposed."""
    bars: float
    """Share of the picture that lies in plain bars along its edges (letterbox, frame), 0 to 1."""
    colors: str
    """Mean colours of 4 x 4 fields, row by row, as hex digits: near copies differ little."""
    phash_mirrored: str
    """The perceptual hash of the mirrored picture."""


def measure(image: Image.Image) -> Measures:
    """Measure an upright RGB picture.

    Source: variance of the Laplacian as a measure of focus, Pech-Pacheco et al. 2000.
    """
    small = reduced(image, SIDE)
    grey = np.asarray(small.convert("L"), dtype=np.float64)
    low, high = np.percentile(grey, (5, 95))
    fields = small.resize((GRID, GRID), Image.Resampling.BOX)
    # keep: reduced as `phash` does it, so that mirroring only turns the sign of its odd frequencies.
    hashed = image.convert("L").resize((PHASH_INPUT, PHASH_INPUT), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return Measures(
        sharpness=round(sharpness(grey), 1),
        luma_low=round(float(low), 1),
        luma_high=round(float(high), 1),
        bars=round(bars(grey), 4),
        colors=fields.tobytes().hex(),
        phash_mirrored=phash(ImageOps.mirror(hashed)),
    )


def reduced(image: Image.Image, side: int) -> Image.Image:
    """The picture with at most `side` pixels on its longer side; never enlarged."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


def sharpness(grey: Pixels) -> float:
    """Variance of the Laplacian of the sharpest tile; 0 for a picture below 3 x 3 pixels."""
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    tiles = min(TILES, *laplacian.shape)
    return max(
        float(tile.var())
        for band in np.array_split(laplacian, tiles, axis=0)
        for tile in np.array_split(band, tiles, axis=1)
    )


PLAIN = 4.0
"""Grey levels: a row whose spread stays below this is plain (JPEG leaves about 2)."""
EDGE = 12.0
"""Grey levels by which a pixel must leave the bar's colour to count as picture."""
EDGE_SHARE = 0.5
"""Share of the first row behind a bar that must be picture; a plain background ends at the subject's tip instead."""


def bars(grey: Pixels) -> float:
    """Share of the picture in plain bars: rows or columns of one colour that end all along a straight line."""
    top, bottom = _bar(grey), _bar(grey[::-1])
    rows = grey[top : len(grey) - bottom]
    if not len(rows):
        return 0.0
    left, right = _bar(rows.T), _bar(rows.T[::-1])
    return 1.0 - len(rows) * (grey.shape[1] - left - right) / grey.size


def _bar(grey: Pixels) -> int:
    """Number of rows at the top that form a bar; 0 when they are background or the whole picture is plain."""
    color = float(np.median(grey[0]))
    plain = (grey.std(axis=1) < PLAIN) & (np.abs(grey.mean(axis=1) - color) < PLAIN)
    count = len(plain) if plain.all() else int(np.argmin(plain))
    # keep: two rows on, because resizing and JPEG smear the line over a row or two.
    behind = grey[min(count + 2, len(grey) - 1)]
    if count == 0 or count == len(grey) or np.mean(np.abs(behind - color) > EDGE) < EDGE_SHARE:
        return 0
    return count
