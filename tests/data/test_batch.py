"""Batches: every draw belongs to its sample; what varies varies as asked; weights and masks arrive."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.batch import Collator, Variation, size_conditioning
from finetune.data.cache import MaskCache, TextCache
from finetune.data.captions import CaptionRules
from finetune.data.dataset import dataset_changes, fingerprint, load_pictures
from finetune.data.pixels import pixel_values
from finetune.data.sampler import Draw
from finetune.data.views import Augment, draw_view, every_view, plain
from finetune.rng import python_rng
from tests.data.conftest import CUT, TWO_AT_ONCE, describe, pictures_in, prepared, tokenize


def collator(folder, cache, variation, *, frozen=True, masks=False, seed=3):
    """A collator over `folder` with everything it may draw encoded."""
    pictures = pictures_in(folder)
    views = [view for p in pictures for view in every_view(p, variation.augment)]
    mask_cache = MaskCache(cache, stride=8) if masks else None
    if mask_cache:
        mask_cache.prepare(views, TWO_AT_ONCE)
    made = Collator(pictures, prepared(pictures, cache, views), tokenize, variation, seed=seed, masks=mask_cache)
    assert made.views() == views
    if not frozen:
        return made
    text = TextCache(cache, "one", tokenize)
    text.prepare(made.captions(), describe, TWO_AT_ONCE)
    return made.with_text(text)


EVERYTHING = Variation(
    Augment(flip=True, random_crop=True, color_jitter=0.2, versions=3),
    CaptionRules(shuffle=True, keep_tokens=1, tag_dropout=0.3, prefix="photo,"),
    caption_variants=4, caption_dropout=0.3,
)  # fmt: skip


def test_draws_belong_to_samples(folder, tmp_path):
    """The same appearance of a picture is the same in whatever batch, process or order it comes."""
    for path in folder.glob("*.txt"):
        path.write_text(f"{path.stem}, a, b, c\n")
    made = collator(folder, tmp_path / "cache", EVERYTHING)
    first, second = Draw(0, 0, 0), Draw(1, 0, 0)
    together = made.step(0, [[first, second]], 0, 1)[0]
    swapped = made.step(0, [[second, first]], 0, 1)[0]
    assert torch.equal(together.noise, swapped.noise.flip(0))
    assert torch.equal(together.latents.mean, swapped.latents.mean.flip(0))
    assert torch.equal(together.sizes.crop_top_left, swapped.sizes.crop_top_left.flip(0))
    assert together.captions == swapped.captions[::-1]
    halves = [made.step(0, [[first, second]], rank, 2)[0] for rank in range(2)]
    assert torch.equal(torch.cat([h.noise for h in halves]), together.noise)
    assert torch.equal(torch.cat([h.quantiles for h in halves]), together.quantiles)
    again = made.step(0, [[Draw(0, 1, 0), second]], 0, 1)[0]
    assert not torch.equal(again.noise[0], together.noise[0]), "another epoch is another draw"


def test_over_many_epochs_a_picture_is_seen_in_all_its_ways(folder, tmp_path):
    """Versions, sides, captions and dropout all occur, about as often as asked."""
    (folder / "2.txt").write_text("one, a, b\ntwo, c, d\n")
    made = collator(folder, tmp_path / "cache", EVERYTHING)
    batches = [made.step(e, [[Draw(2, e, 0)]], 0, 1)[0] for e in range(300)]
    latents = {batch.latents.mean.numpy().tobytes() for batch in batches}
    assert len(latents) == 6, "three versions, two sides"
    captions = [batch.captions[0] for batch in batches]
    assert 60 < captions.count("") < 120, "a share of 0.3"
    assert sum("one" in c for c in captions) > 60 and sum("two" in c for c in captions) > 60
    assert all(c == "" or c.startswith("photo,") for c in captions)


def test_quantiles_are_one_in_each_part(folder, tmp_path):
    """Stratified: n pictures cover all n-ths of the noise levels in every step."""
    made = collator(folder, tmp_path / "cache", Variation(), frozen=False)
    for step in range(5):
        batches = made.step(step, [[Draw(0, step, 0), Draw(1, step, 0)], [Draw(2, step, 0)]], 0, 1)
        quantiles = torch.cat([b.quantiles for b in batches])
        assert sorted((quantiles * 3).long().tolist()) == [0, 1, 2]
        assert [b.images_in_step for b in batches] == [3, 3]


def test_a_mask_travels_with_its_picture(folder, tmp_path):
    """Mirrored with it, filled up with the weight of what is left out, whole for pictures without one."""
    (folder / "masks").mkdir()
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(folder / "masks" / "0.png")
    varied = Variation(Augment(flip=True), unmasked_weight=0.1)
    made = collator(folder, tmp_path / "cache", varied, masks=True)
    sides = set()
    for epoch in range(12):
        batch = made.step(epoch, [[Draw(0, epoch, 0), Draw(1, epoch, 0)]], 0, 1)[0]
        assert batch.loss_mask is not None and batch.loss_mask.shape == (2, 1, 8, 8)
        assert batch.loss_mask[0].min() == pytest.approx(0.1) and batch.loss_mask[0].max() == 1
        assert torch.equal(batch.loss_mask[1], torch.ones(1, 8, 8))
        mirrored = bool(batch.loss_mask[0, 0, 0, 0] < 0.5)
        flipped = not torch.equal(batch.latents.mean[0], made.latents_of(pictures_in(folder)[0]).mean)
        assert mirrored == flipped
        sides.add(mirrored)
    assert sides == {True, False}
    assert collator(folder, tmp_path / "cache", varied).step(0, [[Draw(0, 0, 0)]], 0, 1)[0].loss_mask is None


def test_class_captions_stay_as_they_were_written(folder, tmp_path):
    """Each class picture was rendered from its prompt, and keeps it."""
    made = collator(folder, tmp_path / "cache", replace(EVERYTHING, caption_dropout=0.0), frozen=False)
    made._pictures = [replace(p, is_class=True, captions=("a, b, c",)) for p in made._pictures]
    assert {made.step(e, [[Draw(0, e, 0)]], 0, 1)[0].captions for e in range(20)} == {("a, b, c",)}


def test_a_random_crop_stays_inside_and_is_told(folder, tmp_path):
    """SDXL is told where the crop was; of a mirrored picture, where it is in the mirrored one."""
    Image.effect_noise((150, 100), 80).convert("RGB").save(folder / "0.png")
    picture = pictures_in(folder, replace(CUT, multiple=32))[0]
    views = every_view(picture, Augment(flip=True, random_crop=True, versions=8))
    lefts = {view.placement.crop_top_left[1] for view in views}
    room = picture.placement.resize[1] - picture.placement.bucket[1]
    assert len(lefts) > 3 and all(0 <= left <= room for left in lefts)
    for view in views:
        assert pixel_values(view, CUT.background).shape == (3, *picture.placement.bucket)
    told = size_conditioning(views).crop_top_left[:, 1].tolist()
    for plain_side, mirrored in zip(told[::2], told[1::2], strict=True):
        assert plain_side + mirrored == room
    assert views[0] == plain(picture)


def test_a_zoomed_picture_counts_as_one_framed_like_this(folder):
    """It stays on its subject whatever else varies, and SDXL is told no crop: samples are asked for without one too."""
    for file in folder.iterdir():
        file.unlink()
    Image.effect_noise((640, 480), 80).convert("RGB").save(folder / "0.png")
    row = {"file_name": "0.png", "text": "x", "focus_x": 0.25, "focus_y": 0.5, "focus_width": 0.2, "focus_height": 0.4}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    (picture,), problems = load_pictures(folder, replace(CUT, upscale=False))
    assert any("1 picture is zoomed" in problem.what for problem in problems)
    views = every_view(picture, Augment(flip=True, random_crop=True, versions=4))
    assert {view.placement for view in views} == {picture.placement}
    told = size_conditioning(views)
    assert told.crop_top_left.tolist() == [[0, 0]] * len(views)
    (tall, wide), (down, across) = picture.placement.bucket, picture.placement.resize
    assert told.original_size.tolist() == [[round(480 * tall / down), round(640 * wide / across)]] * len(views)
    assert picture.size == (480, 640) and told.original_size[0, 0] < 220
    closer = [replace(picture, placement=replace(picture.placement, resize=(2 * down, 2 * across)))]
    assert dataset_changes(fingerprint([picture]), fingerprint(closer)) == ["instance/0.png: the crop changed"]


def test_colour_jitter_changes_colours_and_nothing_else(folder):
    """Its strength bounds it; the plain version is never touched."""
    picture = pictures_in(folder)[0]
    views = every_view(picture, Augment(color_jitter=0.1, versions=5))
    assert views[0].jitter is None and len(views) == 5
    assert all(0.9 <= factor <= 1.1 for view in views[1:] for factor in view.jitter)
    base = pixel_values(views[0], CUT.background)
    for view in views[1:]:
        other = pixel_values(view, CUT.background)
        assert other.shape == base.shape and not torch.equal(other, base)
        assert float((other.float() - base.float()).abs().mean()) < 26


def test_views_are_drawn_evenly(folder):
    """Each version comes about as often as the others."""
    picture = pictures_in(folder)[0]
    augment = Augment(color_jitter=0.1, versions=4)
    drawn = [draw_view(picture, augment, python_rng(0, "v", i), python_rng(0, "s", i)) for i in range(800)]
    counts = [drawn.count(view) for view in every_view(picture, augment)]
    assert sum(counts) == 800 and all(150 < count < 250 for count in counts)


def test_large_jpegs_are_drafted_without_a_visible_difference(folder):
    """Decoding at half size saves most of the time; the result stays within a few levels of the full decoder's."""
    x, y = np.meshgrid(np.linspace(0, 20, 1600), np.linspace(0, 14, 1200))
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 9)], -1)
    Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(folder / "0.jpg", quality=92)
    (folder / "0.png").unlink()
    view = plain(pictures_in(folder)[0])
    drafted = pixel_values(view, CUT.background)
    full = Image.open(folder / "0.jpg")
    whole = full.resize(view.placement.resize[::-1], Image.Resampling.LANCZOS)
    (top, left), (height, width) = view.placement.crop_top_left, view.placement.bucket
    expected = np.asarray(whole)[top : top + height, left : left + width].astype(np.float32)
    difference = drafted.permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).mean() < 1.5 and np.abs(difference).max() < 24
