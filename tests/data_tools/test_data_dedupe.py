"""Copies: every near pair is found, nothing else is, and 100,000 pictures stay quick."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from data_tools import dedupe
from data_tools.dedupe import Looks, distances, find_copies, find_shared, near_pairs
from data_tools.errors import UsageError
from data_tools.fingerprints import phash, pixel_sha256
from data_tools.quality import Measures, measure
from data_tools.records import ImageRecord
from tests.data_tools.test_data_quality import scene

PLAIN = bytes(48).hex()


def looks(hashes) -> Looks:
    values = np.array(hashes, dtype=np.uint64)
    return Looks(values, values, np.zeros((len(values), 4, 4, 3), dtype=np.int16))


def described(*images: Image.Image) -> tuple[list[ImageRecord], list[Measures]]:
    records = [
        ImageRecord(f"{n}.png", *image.size, ("x",), pixel_sha256=pixel_sha256(image), phash=phash(image))
        for n, image in enumerate(images)
    ]
    return records, [measure(image) for image in images]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.tuples(st.integers(0, 29), st.sets(st.integers(0, 63), max_size=10)), max_size=30),
    st.integers(0, 12),
)
def test_the_quick_search_finds_exactly_the_near_pairs(base, changes, distance):
    """The shortcut through quarters of the hash must agree with comparing everything with everything."""
    hashes = base + [base[i] ^ sum(1 << bit for bit in bits) for i, bits in changes if i < len(base)]
    i, j, bits = near_pairs(looks(hashes), looks(hashes), distance)
    expected = {
        (a, b): (x ^ y).bit_count()
        for a, x in enumerate(hashes)
        for b, y in enumerate(hashes)
        if (x ^ y).bit_count() <= distance
    }
    assert dict(zip(zip(i.tolist(), j.tolist(), strict=True), bits.tolist(), strict=True)) == expected
    assert len(i) == len(expected)


@pytest.mark.parametrize("distance", range(6))
def test_the_search_among_many_finds_the_same_pairs(distance, monkeypatch):
    """Through thirds of the hash, which 100,000 pictures and more are searched by."""
    chance = np.random.default_rng(distance)
    base = chance.integers(0, 2**64, 300, dtype=np.uint64, endpoint=False)
    bits = [sum(1 << int(bit) for bit in chance.choice(64, chance.integers(0, 8), replace=False)) for _ in base]
    hashes = looks([int(value) for value in base] + [int(value) ^ bit for value, bit in zip(base, bits, strict=True)])
    few = near_pairs(hashes, hashes, distance)
    monkeypatch.setattr(dedupe, "MANY", 0)
    many = near_pairs(hashes, hashes, distance)
    assert all((one == other).all() for one, other in zip(few, many, strict=True)) and len(few[0]) > 600


def test_distance_is_the_number_of_differing_bits():
    """Of 64, all of them."""
    assert distances(np.array([0], dtype=np.uint64), np.array([2**64 - 1], dtype=np.uint64)).tolist() == [64]
    with pytest.raises(UsageError, match="0 to 12"):
        near_pairs(looks([1]), looks([1]), 13)


def test_a_hundred_thousand_pictures_are_compared_without_comparing_all_pairs():
    """All pairs would be 5 billion; a folder of video stills, all alike, must not become that either."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 100_000, dtype=np.uint64)
    hashes[50_000:50_100] = hashes[:100] ^ np.uint64(5)
    hashes[60_000:70_000] = hashes[200]
    digits = [f"{int(value):016x}" for value in hashes]
    records = [ImageRecord(str(n), 9, 9, (), pixel_sha256=str(n), phash=text) for n, text in enumerate(digits)]
    lone = [f"{int(value):016x}" for value in rng.integers(0, 2**63, 100_000, dtype=np.uint64)]
    copies = find_copies(records, [Measures(1, 0, 255, 0, PLAIN, text) for text in lone], 6)
    assert {copy.index for copy in copies} == {*range(50_000, 50_100), *range(60_000, 70_000)}
    assert all(copy.of == (copy.index - 50_000 if copy.index < 60_000 else 200) for copy in copies)


def test_re_saved_resized_brightened_and_mirrored_copies_are_found():
    """What happens to a picture on its way through messengers and editors."""
    image = scene()
    changed = [
        image.resize((320, 240), Image.Resampling.LANCZOS),
        ImageEnhance.Brightness(image).enhance(0.9),
        ImageOps.mirror(image),
        scene(seed=1),
    ]
    copies = find_copies(*described(image, *changed), 6)
    assert [(copy.index, copy.of, copy.mirrored, copy.exact) for copy in copies] == [
        (1, 0, False, False), (2, 0, False, False), (3, 0, True, False)
    ]  # fmt: skip


def test_the_same_shape_in_another_colour_is_no_copy():
    """A red and a blue car before white have the same hash; one dataset may well hold both."""
    pictures = []
    for color in ("red", "blue"):
        image = Image.new("RGB", (400, 400), "white")
        image.paste(color, (100, 100, 300, 300))
        pictures.append(image)
    records, measures = described(*pictures)
    assert distances(*(np.array([int(r.phash, 16)], dtype=np.uint64) for r in records))[0] <= 6
    assert find_copies(records, measures, 6) == []


def test_the_better_picture_stays_and_likeness_is_not_passed_on():
    """Chains of small differences must not throw away a picture that looks like none that is kept."""
    records = [
        ImageRecord("small", 10, 10, (), pixel_sha256="a", phash=f"{0b0000:016x}"),
        ImageRecord("large", 20, 20, (), pixel_sha256="b", phash=f"{0b1111:016x}"),
        ImageRecord("far", 9, 9, (), pixel_sha256="c", phash=f"{0b11111111:016x}"),
        ImageRecord("farther", 9, 9, (), pixel_sha256="d", phash=f"{0b111111111111:016x}"),
        ImageRecord("again", 20, 20, (), pixel_sha256="b", phash=f"{0b1111:016x}"),
    ]
    measures = [Measures(1, 0, 255, 0, PLAIN, "f" * 16)] * 5
    copies = {copy.index: copy for copy in find_copies(records, measures, 4)}
    assert {index: copy.of for index, copy in copies.items()} == {0: 1, 2: 1, 4: 1}
    assert copies[4].exact and copies[0].distance == copies[2].distance == 4
    assert {copy.index for copy in find_copies(records, measures, -1)} == {4}
    preferred = find_copies(records, measures, 4, rank=[0, 1, 0, 0, 1])
    assert {copy.index: copy.of for copy in preferred} == {1: 0, 3: 2, 4: 1}


def test_pictures_of_the_validation_set_are_found_in_the_training_set():
    """Otherwise the validation loss measures memory."""
    held_out, other = scene(seed=5), scene(seed=6)
    small = held_out.resize((300, 225))
    mine = described(other, small, held_out, ImageOps.mirror(held_out))
    found = find_shared(*mine, *described(scene(seed=7), held_out), 6)
    assert [(copy.index, copy.of, copy.exact, copy.mirrored) for copy in found] == [
        (1, 1, False, False), (2, 1, True, False), (3, 1, False, True)
    ]  # fmt: skip
    assert find_shared(*mine, [], [], 6) == [] and find_shared([], [], *mine, 6) == []
