"""From a picture to a bucket's pixels: both resizers, against the long way round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.buckets import assign, make_buckets, zoom
from data_tools.records import Focus
from finetune.data import pixels
from finetune.data.pixels import cut


@pytest.fixture(params=["torch", "Pillow"] if pixels.TORCH_LANCZOS else ["Pillow"])
def resizer(request, monkeypatch):
    """Each of the ways to resize that this torch leaves; the pinned one has both."""
    monkeypatch.setattr(pixels, "TORCH_LANCZOS", request.param == "torch")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(8, 400), st.integers(8, 400), st.booleans())
def test_a_cut_is_exactly_the_bucket(resizer, width, height, upscale):
    """A batch stacks only if every picture has the very size of its bucket."""
    placement = assign(width, height, make_buckets(64, 8), upscale=upscale)
    part = cut(Image.new("RGB", (width, height), (200, 30, 60)), placement)
    assert part.shape == (3, *placement.bucket) and part.dtype == torch.uint8
    assert (part.int() - torch.tensor([200, 30, 60])[:, None, None]).abs().max() <= 1


@pytest.mark.parametrize("zoomed", [False, True])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1500, 1000), (97, 301), (64, 64)])
def test_a_cut_equals_resize_then_crop(resizer, size, zoomed):
    """The quick ways must show the same picture as the one that is documented."""
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    channels = (columns * 255 // size[0], rows * 255 // size[1], (rows + columns) % 256)
    image, sizes = Image.fromarray(np.stack(channels, -1).astype(np.uint8)), make_buckets(64, 8)
    placement = zoom(*size, sizes, Focus(0.3, 0.4, 0.25, 0.3)) if zoomed else assign(*size, sizes)
    (tall, wide), (top, left) = placement.bucket, placement.crop_top_left
    whole = image.resize(placement.resize[::-1], Image.Resampling.LANCZOS)
    long_way = torch.from_numpy(np.array(whole.crop((left, top, left + wide, top + tall)))).permute(2, 0, 1)
    assert (cut(image, placement).int() - long_way.int()).abs().max() <= 6
