"""Caches: never a stale hit, never a needless rebuild, never a half-written entry."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import cache as cache_module
from finetune.data.cache import Filling, LatentCache, MaskCache, TextCache
from finetune.data.dataset import Reading, load_pictures
from finetune.data.views import Augment, View, every_view, plain
from finetune.errors import DataError, NumericError, ResourceError, StorageError
from finetune.families.base import Latents
from tests.data.conftest import CUT, TWO_AT_ONCE, Encoder, describe, pictures_in, prepared, tokenize


def encoded(folder, cache, cut=CUT, vae="vae", augment=None):
    """How many views a fresh start encodes, and what it holds of each picture afterwards."""
    pictures = pictures_in(folder, cut)
    encoder = Encoder()
    latents = LatentCache(cache, vae, cut.background)
    views = [view for p in pictures for view in every_view(p, augment or Augment())]
    latents.prepare(views, encoder, TWO_AT_ONCE)
    return encoder.seen, [latents.get(plain(p)) for p in pictures]


def test_the_second_start_encodes_nothing_and_reads_the_same(folder, tmp_path):
    """Encoding is paid for once."""
    first, wrote = encoded(folder, tmp_path / "cache")
    second, read = encoded(folder, tmp_path / "cache")
    assert (first, second) == (4, 0)
    assert all(torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) for a, b in zip(wrote, read, strict=True))


def test_whatever_decides_a_latent_is_in_its_key(folder, tmp_path, monkeypatch):
    """Fault 46. Every peer read serves stale latents after at least one of these; ours after none."""
    cache = tmp_path / "cache"
    encoded(folder, cache)
    assert encoded(folder, cache, vae="another autoencoder")[0] == 4
    assert encoded(folder, cache, cut=replace(CUT, resolution=32))[0] == 4
    assert encoded(folder, cache, cut=replace(CUT, background=(0, 0, 0)))[0] == 4
    assert encoded(folder, cache, augment=Augment(flip=True))[0] == 4, "only the mirrored half is new"
    picture = Image.open(folder / "0.png")
    picture.putpixel((3, 3), (1, 2, 3))
    picture.save(folder / "0.png")
    assert encoded(folder, cache)[0] == 1
    (folder / "1.txt").write_text("another caption\n")
    assert encoded(folder, cache)[0] == 0, "a caption does not touch the latents"
    monkeypatch.setattr(cache_module, "PIXELS", "another decoder")
    assert encoded(folder, cache)[0] == 4


def test_exif_rotation_is_part_of_the_content(folder, tmp_path):
    """Fault 46: a viewer that only turns the EXIF flag changes what the picture is."""
    picture = Image.open(folder / "2.png")
    picture.save(folder / "2.jpg", quality=95)
    (folder / "2.png").unlink()
    encoded(folder, tmp_path / "cache")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "2.jpg").save(folder / "2.jpg", quality="keep", exif=exif)
    assert encoded(folder, tmp_path / "cache")[0] == 1


def test_two_files_of_one_stem_are_two_entries(folder, tmp_path):
    """Fault 47. Peers name the entry after the stem, and b.jpg trains on the latents of b.png."""
    Image.open(folder / "1.png").convert("RGB").rotate(90).save(folder / "0.jpg")
    count, latents = encoded(folder, tmp_path / "cache")
    assert count == 5
    assert not torch.equal(latents[0].mean, latents[1].mean)


def test_random_edits_never_hit_a_stale_entry(folder, tmp_path):
    """What the cache gives equals what a cache made from nothing gives, after any sequence of edits."""
    draw = random.Random(0)
    for turn in range(8):
        name = folder / f"{draw.randrange(4)}.png"
        picture = Image.open(name).convert("RGB")
        if draw.random() < 0.5:
            picture.putpixel((draw.randrange(picture.width), draw.randrange(picture.height)), (turn, 0, 0))
        picture.rotate(draw.choice([0, 90, 180])).save(name)
        _, cached = encoded(folder, tmp_path / "cache")
        _, fresh = encoded(folder, tmp_path / f"fresh-{turn}")
        assert all(torch.equal(a.mean, b.mean) for a, b in zip(cached, fresh, strict=True))


def test_latents_that_are_not_finite_name_the_picture(folder, tmp_path):
    """Fault 22. SDXL's autoencoder overflows in fp16; peers turn the NaN into zeros and train on them."""
    pictures = pictures_in(folder)
    latents = LatentCache(tmp_path / "cache", "vae", CUT.background)
    with pytest.raises(NumericError, match=r"not finite for \d\.png"):
        latents.prepare(
            [plain(p) for p in pictures], lambda x: Latents(x * float("nan"), torch.zeros_like(x)), TWO_AT_ONCE
        )


def test_mirrored_latents_are_of_the_mirrored_picture(folder, tmp_path):
    """Mirroring latents is not the same as encoding the mirrored picture; ours does the latter."""
    picture = pictures_in(folder)[0]
    sides = every_view(picture, Augment(flip=True))
    latents = prepared([picture], tmp_path / "cache", sides)
    left, right = (latents.get(view).mean for view in sides)
    assert torch.allclose(right, left.flip(-1), atol=1e-6)
    assert not torch.equal(right, left)


def test_captions_are_encoded_once_per_encoder_and_tokenizer(tmp_path):
    """Fault 46. The key is what the tokenizer made of the caption, and the text encoders' weights."""
    asked = []

    def counting(tokens):
        asked.extend(tokens["text_encoder"].tolist())
        return describe(tokens)

    def other_tokenizer(captions):
        return {"text_encoder": tokenize(captions)["text_encoder"] + 1}

    for digest, tokenizer, new in (
        ("one", tokenize, 3), ("one", tokenize, 0), ("two", tokenize, 3), ("one", other_tokenizer, 3)
    ):  # fmt: skip
        before = len(asked)
        cache = TextCache(tmp_path, digest, tokenizer)
        assert cache.prepare(["a cat", "a dog", "a cat", ""], counting, TWO_AT_ONCE) == new
        assert len(asked) - before == new
        expected = describe(tokenizer(["a cat"]))["encoder_hidden_states"][0]
        assert torch.equal(cache.get("a cat")["encoder_hidden_states"], expected)


def test_too_little_memory_halves_the_batch_and_says_so(folder, tmp_path):
    """Fault 25. Peers die in the middle of encoding, or skip pictures."""
    pictures = pictures_in(folder)
    said, sizes = [], []

    def small_card(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Encoder()(pixels)

    latents = LatentCache(tmp_path / "cache", "vae", CUT.background)
    filling = cache_module.Filling(8, say=said.append)
    assert latents.prepare([plain(p) for p in pictures], small_card, filling) == 4
    assert said == ["memory does not suffice for 2 pictures at once; going on with 1 at once"]
    assert sizes.count(2) == 1, "the smaller size holds for all that follow"
    reference = prepared(pictures, tmp_path / "other")
    assert all(torch.equal(latents.get(plain(p)).mean, reference.get(plain(p)).mean) for p in pictures)

    def no_card(pixels):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes.")

    with pytest.raises(ResourceError, match="even one of the pictures"):
        LatentCache(tmp_path / "none", "vae", CUT.background).prepare([plain(pictures[0])], no_card, filling)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    """Fault 5, for caches: the estimate stands in the message, and nothing half-done stays behind."""
    free = type("Usage", (), {"free": 70 * 2**20})
    monkeypatch.setattr("finetune.data.fill.shutil.disk_usage", lambda path: free)
    assert encoded(folder, tmp_path / "fits")[0] == 4
    free.free = 64 * 2**20
    with pytest.raises(StorageError, match=r"need about [\d.]+ \w+ in .* 67\.1 MB are free, of which 67\.1 MB"):
        encoded(folder, tmp_path / "small")
    assert not list((tmp_path / "small").rglob("*.safetensors"))


def test_a_picture_that_changes_while_it_is_prepared_is_refused(folder, tmp_path):
    """Fault 28: what is encoded is what was scanned, or nothing."""
    pictures = pictures_in(folder)
    data = bytearray((folder / "2.png").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "2.png").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"2\.png .*was changed"):
        prepared(pictures, tmp_path / "cache")


@pytest.fixture
def masked(folder):
    """Picture 0 has a mask beside it that is white on the left half; 1 has a black one."""
    (folder / "masks").mkdir()
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(folder / "masks" / "0.png")
    return folder


def test_a_mask_goes_through_the_same_cut_and_mirror(masked, tmp_path):
    """A mask that is cut differently from its picture trains on the wrong place without a word."""
    picture = next(p for p in pictures_in(masked) if p.key == "instance/0.png")
    masks = MaskCache(tmp_path / "cache", stride=8)
    views = every_view(picture, Augment(flip=True))
    assert masks.prepare(views, TWO_AT_ONCE) == 2
    left, right = (masks.get(view) for view in views)
    assert left.shape == (1, 8, 8)
    assert torch.equal(left[..., :3], torch.ones(1, 8, 3)) and torch.equal(left[..., 5:], torch.zeros(1, 8, 3))
    assert torch.equal(right, left.flip(-1))
    assert MaskCache(tmp_path / "cache", stride=8).prepare(views, TWO_AT_ONCE) == 0, "cached"


def test_a_mask_is_averaged_over_each_latent(masked, tmp_path):
    """A latent stands for 8 x 8 pixels; half of them masked means half of its loss."""
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, :36] = 255
    Image.fromarray(mask).save(masked / "masks" / "0.png")
    picture = next(p for p in pictures_in(masked) if p.key == "instance/0.png")
    masks = MaskCache(tmp_path / "cache", stride=8)
    masks.prepare([plain(picture)], TWO_AT_ONCE)
    assert torch.allclose(masks.get(plain(picture))[0, 0], torch.tensor([1.0, 1, 1, 1, 0.5, 0, 0, 0]))


def test_transparent_places_of_a_mask_do_not_count(masked, tmp_path):
    """Painting programs save a mask as white strokes on nothing; the loss would be taken everywhere."""
    strokes = np.zeros((64, 64, 4), dtype=np.uint8)
    strokes[:, :32] = 255
    Image.fromarray(strokes).save(masked / "masks" / "0.png")
    view = plain(next(p for p in pictures_in(masked) if p.key == "instance/0.png"))
    masks = MaskCache(tmp_path / "cache", stride=8)
    masks.prepare([view], TWO_AT_ONCE)
    assert torch.equal(masks.get(view)[0, 0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))


def test_transparency_can_be_the_mask(folder, tmp_path):
    """Cut-outs carry their mask with them; a turned cut-out's mask is turned as well."""
    colours = Image.open(folder / "2.png").convert("RGBA")
    alpha = np.zeros((48, 80), dtype=np.uint8)
    alpha[:, :40] = 255
    colours.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x0112] = 3
    colours.save(folder / "2.png", exif=exif)
    pictures = load_pictures(folder, CUT, Reading(mask="alpha"))[0]
    masks = MaskCache(tmp_path / "cache", stride=8)
    masks.prepare([plain(p) for p in pictures], TWO_AT_ONCE)
    opaque, turned = masks.get(plain(pictures[0])), masks.get(plain(pictures[2]))
    assert torch.equal(opaque, torch.ones_like(opaque))
    middle = turned[0, turned.shape[1] // 2]
    assert middle[0] == 0 and middle[-1] == 1, "the opaque left half is upright on the right"


def test_an_empty_mask_is_refused_by_name(masked, tmp_path):
    """An area-normalised loss over no area at all is 0 / 0."""
    for name in ("0", "1"):
        Image.new("L", (64, 64)).save(masked / "masks" / f"{name}.png")
    views = [plain(p) for p in pictures_in(masked)]
    with pytest.raises(DataError) as caught:
        MaskCache(tmp_path / "cache", stride=8).prepare(views, TWO_AT_ONCE)
    assert "0.png: its mask is black" in str(caught.value) and "1.png: its mask is black" in str(caught.value)
    MaskCache(tmp_path / "cache", stride=8).prepare(views, TWO_AT_ONCE, may_be_empty=True)


def test_an_edited_mask_is_a_new_entry_and_touches_no_latents(masked, tmp_path):
    """Masks are tuned often; the pictures need not be encoded again for it."""
    assert encoded(masked, tmp_path / "cache")[0] == 4
    Image.new("L", (64, 64), 255).save(masked / "masks" / "0.png")
    assert encoded(masked, tmp_path / "cache")[0] == 0
    picture = next(p for p in pictures_in(masked) if p.key == "instance/0.png")
    masks = MaskCache(tmp_path / "cache", stride=8)
    assert masks.prepare([plain(picture)], TWO_AT_ONCE) == 1
    assert masks.get(plain(picture)).min() == 1


def test_a_view_without_a_mask_counts_everywhere(folder, tmp_path):
    """Batches carry a mask for all of their pictures or for none."""
    view: View = plain(pictures_in(folder)[2])
    height, width = view.placement.bucket
    assert torch.equal(MaskCache(tmp_path, stride=8).get(view), torch.ones(1, height // 8, width // 8))


def test_progress_ends_at_all_even_if_nothing_is_left_to_do(folder, tmp_path):
    """A bar that stays at zero looks like a run that is stuck."""
    pictures = pictures_in(folder)
    views = [plain(picture) for picture in pictures]
    for _ in range(2):
        told = []
        latents = LatentCache(tmp_path / "cache", "vae", CUT.background)
        latents.prepare(views, Encoder(), Filling(2, progress=lambda *place, told=told: told.append(place)))
        assert told[-1] == (len(views), len(views))
