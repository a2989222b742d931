"""Crops that follow a mask: the subject stays in the picture, whatever the bucket."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw

from data_tools.buckets import place
from data_tools.focus import mask_focus
from data_tools.scan import scan
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
    assert mask_focus(mask(width, height, box)) == pytest.approx((0.75, 0.25), abs=0.015)
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
