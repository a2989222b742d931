"""Caches: never a stale hit, never a needless rebuild, never a half-written entry."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.batch import Collator
from finetune.data.cache import LatentCache, TextCache
from finetune.data.dataset import Cut, load_pictures, split_holdout
from finetune.data.sampler import Draw
from finetune.errors import NumericError
from finetune.families.base import Latents

CUT = Cut(resolution=64, multiple=8, upscale=True, background=(255, 255, 255))


@pytest.fixture
def folder(tmp_path):
    """Four small pictures of different shapes with captions."""
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate([(64, 64), (64, 64), (48, 80), (80, 48)]):
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n")
    return tmp_path


class Encoder:
    """Stands where the autoencoder stands; counts what it is asked."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pixels):
        self.seen += len(pixels)
        return Latents(torch.nn.functional.avg_pool2d(pixels, 8), torch.full_like(pixels[:, :, ::8, ::8], 0.1))


def encoded(folder, cache, cut=CUT, vae="vae", flip=False):
    """How many pictures a fresh start encodes, and what it holds afterwards."""
    pictures, _ = load_pictures(folder, cut)
    encoder = Encoder()
    latents = LatentCache(cache, vae, cut.background)
    latents.prepare(pictures, flip=flip, encode=encoder, batch_size=2)
    return encoder.seen, [latents.get(p, False) for p in pictures]


def test_the_second_start_encodes_nothing_and_reads_the_same(folder, tmp_path_factory):
    """Encoding is paid for once."""
    cache = tmp_path_factory.mktemp("cache")
    first, wrote = encoded(folder, cache)
    second, read = encoded(folder, cache)
    assert (first, second) == (4, 0)
    assert all(torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) for a, b in zip(wrote, read, strict=True))


def test_whatever_decides_a_latent_is_in_its_key(folder, tmp_path_factory):
    """Every peer read serves stale latents after at least one of these; ours after none."""
    cache = tmp_path_factory.mktemp("cache")
    encoded(folder, cache)
    assert encoded(folder, cache, vae="another autoencoder")[0] == 4
    assert encoded(folder, cache, cut=replace(CUT, resolution=32))[0] == 4
    assert encoded(folder, cache, cut=replace(CUT, background=(0, 0, 0)))[0] == 4
    assert encoded(folder, cache, flip=True)[0] == 4, "only the mirrored half is new"
    picture = Image.open(folder / "0.png")
    picture.putpixel((3, 3), (1, 2, 3))
    picture.save(folder / "0.png")
    assert encoded(folder, cache)[0] == 1
    (folder / "1.txt").write_text("another caption\n")
    assert encoded(folder, cache)[0] == 0, "a caption does not touch the latents"


def test_random_edits_never_hit_a_stale_entry(folder, tmp_path_factory):
    """What the cache gives equals what a cache made from nothing gives, after any sequence of edits."""
    cache, draw = tmp_path_factory.mktemp("cache"), random.Random(0)
    for turn in range(12):
        name = folder / f"{draw.randrange(4)}.png"
        picture = Image.open(name).convert("RGB")
        if draw.random() < 0.5:
            picture.putpixel((draw.randrange(picture.width), draw.randrange(picture.height)), (turn, 0, 0))
        picture.rotate(draw.choice([0, 90, 180])).save(name)
        _, cached = encoded(folder, cache)
        _, fresh = encoded(folder, tmp_path_factory.mktemp("fresh"))
        assert all(torch.equal(a.mean, b.mean) for a, b in zip(cached, fresh, strict=True))


def test_a_damaged_entry_is_encoded_again(folder, tmp_path_factory):
    """A full disk or a lost connection leaves half files; they must not end or spoil a run."""
    cache = tmp_path_factory.mktemp("cache")
    _, before = encoded(folder, cache)
    victim = sorted((cache / "latents").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:40])
    count, after = encoded(folder, cache)
    assert count == 1
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(before, after, strict=True))


def test_latents_that_are_not_finite_name_the_picture(folder, tmp_path_factory):
    """SDXL's autoencoder overflows in fp16; peers turn the NaN into zeros and train on them."""
    pictures, _ = load_pictures(folder, CUT)
    latents = LatentCache(tmp_path_factory.mktemp("cache"), "vae", CUT.background)
    with pytest.raises(NumericError, match=r"not finite for \d\.png"):
        latents.prepare(
            pictures, flip=False, batch_size=2, encode=lambda x: Latents(x * float("nan"), torch.zeros_like(x))
        )


def test_mirrored_latents_are_of_the_mirrored_picture(folder, tmp_path_factory):
    """Mirroring latents is not the same as encoding the mirrored picture; ours does the latter."""
    pictures, _ = load_pictures(folder, CUT)
    latents = LatentCache(tmp_path_factory.mktemp("cache"), "vae", CUT.background)
    latents.prepare(pictures, flip=True, encode=Encoder(), batch_size=2)
    plain, mirrored = (latents.get(pictures[0], m).mean for m in (False, True))
    assert torch.allclose(mirrored, plain.flip(-1), atol=1e-6)
    assert not torch.equal(mirrored, plain)


def test_captions_are_encoded_once_and_per_encoder(tmp_path):
    """The key is the caption and the text encoders' weights."""
    asked = []

    def describe(captions):
        asked.extend(captions)
        return {"encoder_hidden_states": torch.tensor([[float(len(c))] for c in captions])}

    for digest in ("one", "one", "two"):
        cache = TextCache(tmp_path, digest)
        cache.prepare(["a cat", "a dog", "a cat", ""], describe=describe, batch_size=2)
        assert cache.get("a cat")["encoder_hidden_states"].item() == 5
    assert sorted(asked) == sorted(["", "a cat", "a dog"] * 2)


def test_draws_belong_to_samples(folder, tmp_path_factory):
    """The same appearance of a picture gets the same noise in whatever batch, process or order it comes."""
    pictures, _ = load_pictures(folder, CUT)
    latents = LatentCache(tmp_path_factory.mktemp("cache"), "vae", CUT.background)
    latents.prepare(pictures, flip=True, encode=Encoder(), batch_size=2)
    text = TextCache(tmp_path_factory.mktemp("text"), "one")
    text.prepare([c for p in pictures for c in p.captions] + [""], batch_size=8,
                 describe=lambda captions: {"states": torch.zeros(len(captions), 1)})  # fmt: skip
    collator = Collator(pictures, latents, text, seed=3, flip=True, caption_dropout=0.3)
    first, second = Draw(0, 0, 0), Draw(1, 0, 0)
    together = collator.step(0, [[first, second]], 0, 1)[0]
    swapped = collator.step(0, [[second, first]], 0, 1)[0]
    assert torch.equal(together.noise, swapped.noise.flip(0))
    assert torch.equal(together.latents.mean, swapped.latents.mean.flip(0))
    assert together.captions == swapped.captions[::-1]
    halves = [collator.step(0, [[first, second]], rank, 2)[0] for rank in range(2)]
    assert torch.equal(torch.cat([h.noise for h in halves]), together.noise)
    assert torch.equal(torch.cat([h.quantiles for h in halves]), together.quantiles)
    again = collator.step(0, [[Draw(0, 1, 0), second]], 0, 1)[0]
    assert not torch.equal(again.noise[0], together.noise[0]), "another epoch is another draw"


def test_quantiles_are_one_in_each_part(folder, tmp_path_factory):
    """Stratified: n pictures cover all n-ths of the noise levels in every step."""
    pictures, _ = load_pictures(folder, CUT)
    latents = LatentCache(tmp_path_factory.mktemp("cache"), "vae", CUT.background)
    latents.prepare(pictures, flip=False, encode=Encoder(), batch_size=2)
    collator = Collator(pictures, latents, lambda c: {"text_encoder": torch.zeros(len(c), 1)}, seed=0, flip=False,
                        caption_dropout=0.0)  # fmt: skip
    for step in range(5):
        batches = collator.step(step, [[Draw(0, step, 0), Draw(1, step, 0)], [Draw(2, step, 0)]], 0, 1)
        quantiles = torch.cat([b.quantiles for b in batches])
        assert sorted((quantiles * 3).long().tolist()) == [0, 1, 2]
        assert [b.images_in_step for b in batches] == [3, 3]


def test_holdout_depends_on_seed_and_names_only(folder):
    """A resumed or repeated run holds out the same pictures."""
    pictures, _ = load_pictures(folder, CUT)
    _, held = split_holdout(pictures, 2, seed=0)
    _, again = split_holdout(list(reversed(pictures)), 2, seed=0)
    assert {p.key for p in held} == {p.key for p in again}
