"""What the tests of training data share: pictures, a stand-in for the autoencoder, no memory outside of the test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.cache import Filling, LatentCache
from finetune.data.dataset import Cut, load_pictures
from finetune.data.pixels import to_values
from finetune.data.views import plain
from finetune.families.base import Latents

CUT = Cut(resolution=64, multiple=8, upscale=True, background=(255, 255, 255))
TWO_AT_ONCE = Filling(2)


@pytest.fixture(autouse=True)
def own_memory(tmp_path_factory, monkeypatch):
    """Scans remember pictures in the user's cache folder; a test has its own."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("memory")))


@pytest.fixture
def folder(tmp_path):
    """Four small pictures of different shapes with captions."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate([(64, 64), (64, 64), (48, 80), (80, 48)]):
        noise = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}\n")
    return pictures


class Encoder:
    """Stands where the autoencoder stands; counts what it is asked."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pixels):
        self.seen += len(pixels)
        pixels = to_values(pixels)
        return Latents(torch.nn.functional.avg_pool2d(pixels, 8), torch.full_like(pixels[:, :, ::8, ::8], 0.1))


def tokenize(captions):
    """Stands where the tokenizer stands: one number per character, padded."""
    ids = [[ord(char) for char in caption[:32]] + [0] * max(0, 32 - len(caption)) for caption in captions]
    return {"text_encoder": torch.tensor(ids)}


def describe(tokens):
    """Stands where the text encoder stands."""
    return {"encoder_hidden_states": tokens["text_encoder"][:, :, None].float()}


def prepared(pictures, cache, views=None):
    """A latent cache that holds the plain views, or those given."""
    latents = LatentCache(cache, "vae", CUT.background)
    latents.prepare(views or [plain(p) for p in pictures], Encoder(), TWO_AT_ONCE)
    return latents


def pictures_in(folder, cut=CUT):
    """The pictures of a folder."""
    return load_pictures(folder, cut)[0]
