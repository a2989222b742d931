"""Crops that follow a mask: the subject stays in the picture, whatever the bucket."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw

from data_tools.buckets import place
from data_tools.errors import RefusedError
from data_tools.focus import mask_focus
from data_tools.records import Focus
from data_tools.scan import scan
from data_tools.verdicts import parse_focus
from tests.data_tools.test_data_cli import run
from tests.data_tools.test_data_quality import scene

__all__ = ["run"]


def mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


@pytest.mark.parametrize("size", [(100, 100), (2000, 1000), (37, 400)])
def test_the_focus_is_the_middle_of_what_is_marked(size):
    """At any size; a mask that marks nothing has no middle."""
    width, height = size
    box = (width // 2, 0, width - 1, height // 2 - 1)
    assert mask_focus(mask(width, height, box)) == pytest.approx((0.75, 0.25, 0, 0), abs=0.015)
    assert mask_focus(mask(width, height, box), 0.0) == pytest.approx((0.75, 0.25, 0.5, 0.5), abs=0.045)
    assert mask_focus(mask(width, height, box), 0.25) == pytest.approx((0.75, 0.25, 0.75, 0.75), abs=0.07)
    assert mask_focus(Image.new("L", size)) is None


def test_crops_follow_the_masks_from_the_command_to_the_placement(run, tmp_path):
    """Clean writes the point, scan reads it, the bucket is cut around it, and a point set by hand stays."""
    scene(1200, 400).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    (tmp_path / "masks").mkdir()
    mask(1200, 400, (1000, 100, 1150, 300)).save(tmp_path / "masks" / "wide.png")
    assert run("clean", tmp_path, "--focus-on-masks", "--write").returncode == 0
    row = json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])
    assert row["focus_x"] == pytest.approx(0.896, abs=0.01) and row["focus_y"] == pytest.approx(0.5, abs=0.01)
    record = next(record for record in scan(tmp_path).records if record.file_name == "wide.png")
    assert place([record], [(400, 400)])[0].crop_top_left == (0, 800)
    text = (tmp_path / "metadata.jsonl").read_text().replace(f'"focus_x": {row["focus_x"]}', '"focus_x": 0.1')
    (tmp_path / "metadata.jsonl").write_text(text)
    assert run("clean", tmp_path, "--focus-on-masks", "--write").returncode == 0
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])["focus_x"] == 0.1


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_speck_does_not_widen_what_is_zoomed_to():
    """Models mark a few pixels elsewhere; the crop must not be as wide as the way to them."""
    marked = mask(1000, 1000, (400, 400, 599, 599))
    ImageDraw.Draw(marked).rectangle((980, 980, 985, 985), fill=255)
    assert mask_focus(marked, 0.0) == pytest.approx((0.5, 0.5, 0.2, 0.2), abs=0.02)


def test_zooming_from_the_command_to_the_bucket(run, tmp_path):
    """A face that is a hundredth of the photo fills the crop; the margin can be changed, a hand's focus stays."""
    scene(1600, 1000).save(tmp_path / "a.png")
    scene(1600, 1000, 1).save(tmp_path / "b.png")
    (tmp_path / "masks").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a photo of sks")
        mask(1600, 1000, (1200, 300, 1399, 499)).save(tmp_path / "masks" / f"{name}.png")
    before = (tmp_path / "a.png").read_bytes()
    assert run("clean", tmp_path, "--focus-on-masks", "--write").returncode == 0
    assert "focus_width" not in rows(tmp_path)[0]
    done = run("clean", tmp_path, "--zoom", 0.5, "--write")
    assert done.returncode == 0 and "Crops zoom to what the masks of 2 pictures of 2 mark" in done.stdout
    row = rows(tmp_path)[0]
    assert (row["focus_width"], row["focus_height"]) == pytest.approx((0.25, 0.4), abs=0.015)
    again = (tmp_path / "metadata.jsonl").read_bytes()
    assert run("clean", tmp_path, "--zoom", 0.5, "--write").returncode == 0
    assert (tmp_path / "metadata.jsonl").read_bytes() == again, "a second run changes nothing"
    plan = json.loads(run("bucket", tmp_path, "--resolution", 256, "--json").stdout)["pictures"][0]
    assert plan["zoomed"] and plan["bucket"] == [256, 256] and plan["resize"] == pytest.approx([1024, 640], abs=30)
    shown = run("bucket", tmp_path, "--resolution", 256).stdout
    assert "2 pictures are zoomed to their focus" in shown
    first, second = rows(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(f"{json.dumps({**first, 'focus_x': 0.3})}\n{json.dumps(second)}\n")
    assert run("clean", tmp_path, "--zoom", 1, "--write").returncode == 0
    first, second = rows(tmp_path)
    assert first["focus_x"] == 0.3 and first["focus_width"] == pytest.approx(0.25, abs=0.015)
    sizes = (second["focus_width"], second["focus_height"])
    assert sizes == pytest.approx((0.375, 0.6), abs=0.02)
    assert (tmp_path / "a.png").read_bytes() == before, "nothing is written over the user's pictures"


def test_a_zoom_without_masks_says_where_to_get_them(run, tmp_path):
    """A user who forgot the step before must not believe that it worked."""
    scene(300, 300).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    done = run("clean", tmp_path, "--zoom", 0.5)
    assert done.returncode == 2 and "`finetune data mask` makes some" in done.stderr


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"focus_x": 0.5, "focus_y": 0.5, "focus_width": 0.2}, "focus_height=None"),
        ({"focus_x": 0.5, "focus_y": 0.5, "focus_width": 0, "focus_height": 0.4}, "focus_width=0"),
        ({"focus_width": 0.5, "focus_height": 0.5}, "write focus_x and focus_y as well"),
        ({"focus_x": 0.5, "focus_y": 0.5, "focus_width": 1.4, "focus_height": 0.4}, "focus_width=1.4"),
        ({"focus_x": 1.5, "focus_y": 0.5}, "focus_x=1.5"),
    ],
)
def test_a_focus_that_cannot_be_meant_is_named(columns, word):
    """Numbers written by hand go wrong; half a size would be a crop that nobody asked for."""
    with pytest.raises(RefusedError, match=word):
        parse_focus(columns)
    assert parse_focus({"focus_x": 0.5, "focus_y": 0.5}) == Focus(0.5, 0.5)
