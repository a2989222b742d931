"""Buckets: the arithmetic from a picture's size to resize and crop, for every size there is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.buckets import (
    PRESETS,
    around,
    assign,
    centred,
    make_buckets,
    move,
    place,
    plan_table,
    preset,
    sdxl_paper,
    slack,
    zoom,
    zoom_notes,
)
from data_tools.errors import DataToolsError, UsageError
from data_tools.records import Focus, ImageRecord
from tests.data_tools.test_data_cli import run

__all__ = ["run"]

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


def test_the_published_list_is_a_preset():
    """Training at sizes the base has seen; both orientations, nothing else."""
    both = {*SDXL, *((width, height) for height, width in SDXL)}
    assert set(sdxl_paper()) == both and len(sdxl_paper()) == 41 == len(set(preset("sdxl-paper")))
    assert set(PRESETS) >= {"512", "1024", "sdxl-paper"}
    with pytest.raises(UsageError, match="choose one of"):
        preset("sdxl-papre")


@pytest.mark.parametrize("name", sorted(PRESETS))
@settings(max_examples=60, deadline=None)
@given(width=st.integers(64, 5000), height=st.integers(64, 5000))
def test_every_preset_gives_sound_placements(name, width, height):
    """Within the area of the list, inside the picture, never enlarged."""
    sizes = preset(name)
    placement = assign(width, height, sizes)
    assert placement.bucket[0] * placement.bucket[1] <= max(h * w for h, w in sizes)
    assert placement.resize[0] <= height and placement.resize[1] <= width
    assert all(side % 16 == 0 for side in placement.bucket)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_every_crop_lies_inside_and_around_its_point(width, height, across, down, upscale):
    """A crop outside the picture would show its edge smeared; one off the face would cut it."""
    sizes = make_buckets(512, 64)
    try:
        plain = assign(width, height, sizes, upscale=upscale)
    except DataToolsError:
        return
    for crop in (centred, around((across, down)), slack(across, down)):
        placement = move(plain, crop)
        assert (placement.bucket, placement.resize, placement.lost) == (plain.bucket, plain.resize, plain.lost)
        for offset, part, whole in zip(placement.crop_top_left, placement.bucket, placement.resize, strict=True):
            assert 0 <= offset <= whole - part
    placement = move(plain, around((across, down)))
    for share, offset, part, whole in zip(
        (down, across), placement.crop_top_left, placement.bucket, placement.resize, strict=True
    ):
        ideal = share * whole - part / 2
        nearest = min(max(0, ideal), whole - part)
        assert abs(offset - nearest) <= 0.5 + 1e-9
    assert move(plain, around((0.5, 0.5))).crop_top_left[0] - plain.crop_top_left[0] in (0, 1)
    assert assign(width, height, sizes, upscale=upscale, crop=slack(0, 0)).crop_top_left == (0, 0)


def test_random_crops_reach_every_place_equally():
    """Two uniform draws are all the randomness there is, and the last row is as likely as the first."""
    plain = assign(600, 512, [(512, 512)])
    found = [move(plain, slack((n + 0.5) / 890, 0.0)).crop_top_left[1] for n in range(890)]
    assert sorted(set(found)) == list(range(89)) and {found.count(place) for place in set(found)} == {10}
    assert move(plain, slack(1.0, 1.0)).crop_top_left == (0, 88)


def test_a_record_is_cropped_around_its_focus():
    """The column in the manifest is what decides; without one it is the middle."""
    records = [
        ImageRecord("left.png", 1000, 500, ("x",), focus=Focus(0.1, 0.5)),
        ImageRecord("plain.png", 1000, 500, ("x",)),
    ]
    left, plain = place(records, [(512, 512)], upscale=True)
    assert left.crop_top_left == (0, 0) and plain.crop_top_left == (0, 256)


@settings(max_examples=400, deadline=None)
@given(sides, sides, st.floats(0, 1), st.floats(0, 1), st.floats(0.02, 1), st.floats(0.02, 1), st.booleans())
def test_a_zoom_shows_what_is_marked_and_enlarges_nothing(width, height, across, down, wide, tall, upscale):
    """A face that is cut off teaches half a face; one that is enlarged teaches blur."""
    sizes = make_buckets(512, 64)
    focus = Focus(across, down, wide, tall)
    try:
        placement = zoom(width, height, sizes, focus, upscale=upscale, multiple=64)
    except DataToolsError:
        assert not upscale and min(width, height) < 64
        return
    bucket, resize, offset = placement.bucket, placement.resize, placement.crop_top_left
    assert all(0 <= o <= whole - part for o, part, whole in zip(offset, bucket, resize, strict=True))
    assert upscale or (resize[0] <= height and resize[1] <= width)
    assert upscale or bucket[0] % 64 == bucket[1] % 64 == 0
    if placement.zoomed:
        assert abs(resize[0] * width - resize[1] * height) <= max(width, height)
        for middle, size, o, part, whole in zip((down, across), (tall, wide), offset, bucket, resize, strict=True):
            first, last = max(0, middle - size / 2) * whole, min(1, middle + size / 2) * whole
            assert o <= first + 1.5 and last <= o + part + 1.5
    if placement.zoomed and resize != (height, width):
        filled = ((min(1, m + s / 2) - max(0, m - s / 2)) * whole / part
                  for m, s, part, whole in zip((down, across), (tall, wide), bucket, resize, strict=True))  # fmt: skip
        assert max(filled) > 0.97, "what is marked reaches from edge to edge in one direction"


def test_zooms_are_told():
    """The shape is that of what is marked; a picture of which only a part is seen is never one in silence."""
    records = [
        ImageRecord("face.png", 3000, 2000, ("x",), focus=Focus(0.5, 0.5, 0.2, 0.3)),
        ImageRecord("coarse.png", 900, 600, ("x",), focus=Focus(0.5, 0.5, 0.1, 0.15)),
        ImageRecord("plain.png", 3000, 2000, ("x",)),
    ]
    sizes = make_buckets(512, 64)
    placements = place(records, sizes, multiple=64)
    assert [placement.zoomed for placement in placements] == [True, True, False]
    assert placements[0].bucket == (512, 512) and placements[0].resize == (1707, 2560)
    assert placements[1].bucket == (512, 512) and placements[1].resize == (600, 900), "its own pixels"
    assert placements[0].as_json()["zoomed"] is True
    (note,) = zoom_notes(records, placements)
    assert "2 pictures are zoomed" in note.what and "1 of them only as far as" in note.what
    assert zoom_notes(records[2:], placements[2:]) == []
    assert place(records[1:2], sizes, upscale=True, multiple=64)[0].resize == (3413, 5120)


def test_the_plan_as_a_picture(tmp_path):
    """Every bucket has a field, drawn in blue; an empty plan is a picture too."""
    from data_tools.plan_picture import CELL, draw_plan, save_plan

    records = [ImageRecord(f"{n}.png", *size, ("x",)) for n, size in enumerate([(800, 600), (600, 800), (900, 300)])]
    placements = place(records, make_buckets(512, 64))
    sheet = draw_plan(records, placements)
    pixels = np.asarray(sheet)
    blue = (pixels == (37, 99, 235)).all(axis=-1)
    assert sheet.width == 40 + 3 * CELL[0]
    assert all(blue[:, 20 + n * CELL[0] : 20 + (n + 1) * CELL[0]].any() for n in range(3))
    assert save_plan(records, placements, tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert draw_plan([], []).width > 0
    with pytest.raises(DataToolsError, match="cannot be written"):
        save_plan(records, placements, tmp_path / "nowhere" / "plan.png")


def test_a_zoomed_picture_is_drawn_whole_around_its_bucket():
    """Cut off at the field's edge, 97 % that are cropped away would look like a narrow frame."""
    from data_tools.buckets import Placement
    from data_tools.plan_picture import CELL, draw_plan

    placement = Placement((256, 256), (1800, 1200), (1400, 100), 0.97)
    pixels = np.asarray(draw_plan([ImageRecord("a.png", 1200, 1800, ("x",))], [placement]))[80 : CELL[1] - 4]
    rows = (pixels != 255).any(axis=(1, 2)).nonzero()[0]
    blue = (pixels == (37, 99, 235)).all(axis=-1).any(axis=1).sum()
    assert (rows.max() - rows.min() + 1) / blue == pytest.approx(1800 / 256, rel=0.1)


def test_the_command_knows_presets_pictures_and_json(run, tmp_path, save):
    """For people, for eyes, for programs; a list and numbers beside it are a contradiction."""
    save("a.png", 1400, 1000, 1, caption="a")
    save("b.png", 900, 1300, 2, caption="b")
    result = run("bucket", tmp_path, "--preset", "sdxl-paper", "--json", "--picture", tmp_path / "plan.png")
    plan = json.loads(result.stdout)
    assert result.returncode == 0 and [row["size"] for row in plan["buckets"]] == [[832, 1216], [1152, 832]]
    assert plan["pictures"][0]["bucket"] == [1152, 832] and (tmp_path / "plan.png").exists()
    (tmp_path / "plan.png").unlink()
    assert run("bucket", tmp_path, "--preset", "512", "--multiple", 8).returncode == 2
    assert run("scan", tmp_path, "--write").returncode == 0
    rows = (tmp_path / "metadata.jsonl").read_text().replace('"width": 900', '"verdict": "drop", "width": 900')
    (tmp_path / "metadata.jsonl").write_text(rows)
    result = run("bucket", tmp_path, "--resolution", 512)
    assert "b.png: is left out by its verdict" in result.stdout and "1 1" in " ".join(result.stdout.split())
