"""Measures of single pictures: they must tell good from bad ones, at any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from data_tools.quality import SIDE, bars, measure, reduced, sharpness


def scene(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    """Something with edges everywhere, in many greys and colours."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), (120, 130, 140))
    pen = ImageDraw.Draw(image)
    for _ in range(120):
        x, y = rng.integers(0, width), rng.integers(0, height)
        size = int(rng.integers(5, 1 + min(width, height) // 3))
        color = tuple(int(v) for v in rng.integers(0, 256, 3))
        pen.ellipse((x, y, x + size, y + size), fill=color)
    return image


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_blur_is_seen_at_every_size(factor):
    """One threshold has to serve a phone's 12 MP and a thumbnail's crop."""
    sharp = scene().resize((640 * factor, 480 * factor), Image.Resampling.LANCZOS)
    soft = sharp.filter(ImageFilter.GaussianBlur(2.5 * sharp.width / SIDE))
    assert measure(sharp).sharpness > 100 and measure(soft).sharpness < 60


def test_a_sharp_subject_before_a_soft_background_is_sharp():
    """Portraits are made so on purpose."""
    image = scene().filter(ImageFilter.GaussianBlur(12))
    image.paste(scene(160, 120, 3), (200, 160))
    assert measure(image).sharpness > 100


def test_exposure_is_told_by_what_is_missing():
    """A dark picture has nothing bright, a bright one nothing dark; white behind an object is neither."""
    normal = measure(scene())
    dark = measure(scene().point(lambda v: v // 8))
    bright = measure(scene().point(lambda v: 225 + v // 9))
    assert dark.luma_high < 50 < normal.luma_high and bright.luma_low > 200 > normal.luma_low
    product = Image.new("RGB", (500, 500), "white")
    product.paste(scene(200, 200), (150, 150))
    assert measure(product).luma_low < 200


@pytest.mark.parametrize("border", [(0, 60, 0, 60), (70, 0, 70, 0), (30, 30, 30, 30), (0, 80, 0, 0)])
@pytest.mark.parametrize("color", ["black", "white", (40, 80, 120)])
def test_bars_are_measured_to_the_pixel(border, color):
    """Bars would be learned as part of the style."""
    framed = ImageOps.expand(scene(400, 400), border, color)
    share = 1 - 400 * 400 / (framed.width * framed.height)
    assert measure(framed).bars == pytest.approx(share, abs=0.02)


def test_a_plain_background_is_no_bar():
    """A subject in front of white paper fills part of the line where the paper ends, not all of it."""
    image = Image.new("RGB", (400, 400), "white")
    ImageDraw.Draw(image).ellipse((100, 120, 300, 300), fill="red")
    assert measure(image).bars == 0 and measure(scene()).bars == 0
    assert measure(Image.new("RGB", (300, 300), (9, 9, 9))).bars == 0


def test_mirroring_swaps_the_two_hashes():
    """A mirrored copy is found by comparing one picture's hash with the other's mirrored hash."""
    from data_tools.fingerprints import phash

    image = scene()
    assert measure(image).phash_mirrored == phash(ImageOps.mirror(image))
    assert measure(ImageOps.mirror(image)).phash_mirrored == phash(image) != phash(ImageOps.mirror(image))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 255))
def test_any_picture_can_be_measured(width, height, tint):
    """One pixel wide, flat, tall: a number comes out, never a crash or a NaN."""
    measures = measure(Image.new("RGB", (width, height), (tint, 255 - tint, 7)))
    assert measures.sharpness == 0 and 0 <= measures.luma_low <= measures.luma_high <= 255 and measures.bars == 0
    assert len(measures.colors) == 96 and len(measures.phash_mirrored) == 16
    assert max(reduced(Image.new("RGB", (width, height)), 512).size) == min(512, max(width, height))


def test_numbers_of_tiny_arrays():
    """The edges of the arithmetic."""
    assert sharpness(np.zeros((2, 9))) == 0 and bars(np.zeros((1, 1))) == 0
