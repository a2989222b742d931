"""Buckets: the arithmetic from a picture's size to resize and crop, for every size there is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.buckets import assign, cut, make_buckets, place, plan_table
from data_tools.errors import DataToolsError, UsageError
from data_tools.records import ImageRecord

# SDXL paper, arXiv:2307.01952, appendix I: (height, width)
SDXL = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip
SETTINGS = [
    (64, 8),
    (64, 16),
    (64, 64),
    (128, 8),
    (512, 64),
    (512, 8),
    (768, 64),
    (1024, 64),
    (1024, 16),
    (1000, 64),
]
sides = st.integers(1, 6000)


@pytest.mark.parametrize("resolution, multiple", SETTINGS)
def test_buckets_keep_the_area_within_a_step(resolution, multiple):
    """Memory is planned for resolution^2 pixels: never more, and less by under one step."""
    sizes = make_buckets(resolution, multiple)
    square = resolution // multiple * multiple
    assert len(set(sizes)) == len(sizes) and (square, square) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2 and (width, height) in sizes
        assert resolution / 2 <= max(height, multiple) and max(height, width) <= 2 * resolution
        assert (min(height, width) + multiple) * max(height, width) > resolution**2 or max(
            height, width
        ) == min(height, width)


def test_1024_gives_the_sizes_sdxl_was_trained_on():
    """Other sizes at 1024 are off the base model's habit."""
    ours = set(make_buckets(1024, 64))
    assert {*SDXL, *((width, height) for height, width in SDXL)} >= ours
    assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344), (640, 1536), (512, 2048)} <= ours


def test_512_gives_kohyas_list():
    """People compare with what they know."""
    assert {(512, 512), (448, 576), (384, 640), (320, 768), (256, 1024), (1024, 256)} <= set(
        make_buckets(512, 64)
    )


def test_tiny_resolutions_have_buckets():
    """The embedded base model draws 64 x 64."""
    assert make_buckets(64, 8)[0] == (128, 32) and (64, 64) in make_buckets(64, 16)
    assert make_buckets(64, 64) == [(64, 64)]


@pytest.mark.parametrize("arguments", [(4, 8), (64, 0), (512, 64, 600), (512, 64, None, 256), (10**7, 1)])
def test_sizes_that_leave_no_bucket_are_refused(arguments):
    """An empty list would fail much later, at the first picture."""
    with pytest.raises(UsageError, match="resolution="):
        make_buckets(*arguments)


@settings(max_examples=400, deadline=None)
@given(sides, sides, st.sampled_from(SETTINGS), st.booleans())
def test_every_placement_is_sound(width, height, setting, upscale):
    """For any picture: a bucket within the area, cut from inside a resize that covers it, not enlarged."""
    sizes = make_buckets(*setting)
    try:
        placement = assign(width, height, sizes, upscale=upscale, multiple=setting[1])
    except DataToolsError:
        assert not upscale and min(width, height) < setting[1]
        return
    (tall, wide), resize, (top, left) = placement.bucket, placement.resize, placement.crop_top_left
    assert tall % setting[1] == wide % setting[1] == 0 and tall * wide <= setting[0] ** 2
    assert resize[0] >= tall and resize[1] >= wide and (resize[0] == tall or resize[1] == wide)
    assert 0 <= top <= resize[0] - tall and 0 <= left <= resize[1] - wide
    assert (top, left) == ((resize[0] - tall) // 2, (resize[1] - wide) // 2)
    assert abs(resize[0] * width - resize[1] * height) <= max(width, height)
    assert (
        abs(placement.lost - (1 - tall * wide / (resize[0] * resize[1]))) < 1e-12 and 0 <= placement.lost < 1
    )
    if upscale:
        assert placement.bucket in sizes
    else:
        assert resize[0] <= height and resize[1] <= width


@settings(max_examples=200, deadline=None)
@given(st.integers(600, 6000), st.integers(600, 6000))
def test_the_nearest_shape_is_chosen(width, height):
    """Any other bucket of the list would crop more, up to the rounding of the resize."""
    sizes = make_buckets(512, 64)
    placement = assign(width, height, sizes)
    if placement.bucket not in sizes:
        return
    ratio = abs(np.log(placement.bucket[1] / placement.bucket[0] * height / width))
    assert all(ratio <= abs(np.log(w / h * height / width)) + 1e-8 for h, w in sizes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(64, 3000), st.integers(64, 3000), st.integers(1, 9)), max_size=30))
def test_the_plan_counts_every_picture_once(pictures):
    """A picture in no bucket is never trained on; in two, twice."""
    records = [ImageRecord(f"{n}.png", w, h, ("x",), repeats=r) for n, (w, h, r) in enumerate(pictures)]
    placements = place(records, make_buckets(512, 64))
    rows = plan_table(records, placements)
    assert sum(row.pictures for row in rows) == len(records)
    assert sum(row.samples for row in rows) == sum(record.repeats for record in records)
    assert len({row.bucket for row in rows}) == len(rows)
    assert all(0 <= row.mean_lost <= row.max_lost + 1e-12 and row.most_lost for row in rows)


def test_small_pictures_get_a_bucket_of_their_own_size():
    """The documented rule: own sides rounded down to the multiple, never enlarged in silence."""
    sizes = make_buckets(1024, 64)
    assert assign(300, 500, sizes).bucket == (448, 256)
    assert assign(1000, 1000, sizes).bucket == assign(1000, 1000, sizes).resize == (960, 960)
    assert assign(300, 500, sizes, upscale=True).bucket in sizes
    assert assign(400, 3000, sizes).bucket == (2048, 384)
    assert assign(20, 20, make_buckets(64, 64), multiple=8).bucket == (16, 16)


def test_pictures_below_one_step_are_refused_all_by_name():
    """Training cannot show them at all; every one is named."""
    records = [
        ImageRecord("a.png", 63, 900, ("x",)),
        ImageRecord("b.png", 900, 900, ("x",)),
        ImageRecord("c.png", 9, 9, ("x",)),
    ]
    with pytest.raises(DataToolsError, match=r"a\.png: .*63 x 900(.|\n)*c\.png") as caught:
        place(records, make_buckets(512, 64))
    assert "b.png" not in str(caught.value)
    with pytest.raises(UsageError, match="no buckets"):
        assign(10, 10, [])


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 400), st.integers(8, 400), st.booleans())
def test_cut_gives_exactly_the_bucket(width, height, upscale):
    """A batch stacks only if every picture has the very size of its bucket."""
    placement = assign(width, height, make_buckets(64, 8), upscale=upscale)
    image = cut(Image.new("RGB", (width, height), (200, 30, 60)), placement)
    assert image.size == (placement.bucket[1], placement.bucket[0])
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 60)).max() <= 1


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1500, 1000), (97, 301), (64, 64)])
def test_cut_equals_resize_then_crop(size, draw):
    """The short way (resize only the box) must show the same picture as the one that is documented."""
    image, placement = draw(*size), assign(*size, make_buckets(64, 8))
    (tall, wide), (top, left) = placement.bucket, placement.crop_top_left
    long_way = image.resize(placement.resize[::-1], Image.Resampling.LANCZOS).crop(
        (left, top, left + wide, top + tall)
    )
    assert np.abs(np.asarray(cut(image, placement)).astype(int) - np.asarray(long_way)).max() <= 6


def test_cut_refuses_a_picture_of_another_shape():
    """A placement made before the rotation would squeeze the picture in silence."""
    with pytest.raises(ValueError, match="200 x 100"):
        cut(Image.new("RGB", (100, 200)), assign(200, 100, make_buckets(64, 8)))
    extreme = assign(1, 3000, make_buckets(64, 8), upscale=True)
    assert cut(Image.new("RGB", (1, 3000)), extreme).size == extreme.bucket[::-1]
