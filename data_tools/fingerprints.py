"""Fingerprints of a picture: of its file, of its pixels, of its looks."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

PHASH_INPUT = 32
PHASH_KEPT = 8
# Row k is the cosine of frequency k; its scale does not matter, as only signs against the median are kept.
_COSINES = np.cos(np.pi / PHASH_INPUT * np.outer(np.arange(PHASH_KEPT), np.arange(PHASH_INPUT) + 0.5))


def sha256(data: bytes) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def pixel_sha256(image: Image.Image) -> str:
    """Hex digest of size and pixels of an RGB picture: equal for the same pixels in any file format."""
    digest = hashlib.sha256(f"{image.width}x{image.height} RGB ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def phash(image: Image.Image) -> str:
    """64-bit perceptual hash, 16 hex digits: near copies differ in few bits (0 to 10), others in about 32.

    The picture becomes 32 x 32 grey; of its discrete cosine transform the 8 x 8 lowest frequencies are
    compared with their median, one bit each, row by row.

    Source: the DCT hash of pHash (Zauner 2010), with the details of the ImageHash library.
    """
    grey = image.convert("L").resize((PHASH_INPUT, PHASH_INPUT), Image.Resampling.LANCZOS, reducing_gap=3.0)
    # keep: rounded, so that a flat picture's zero coefficients do not turn into coin tosses of the last bit.
    low = np.round(_COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T, 3)
    return np.packbits(low > np.median(low)).tobytes().hex()
