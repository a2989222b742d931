"""The bucket plan as a picture: every bucket to scale, over it the outlines of the pictures that are cut to it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_tools.buckets import BucketRow, Placement, Size, plan_table
from data_tools.errors import StorageError, counted, shown
from data_tools.records import ImageRecord

CELL = (300, 340)
"""Width and height of a bucket's field, pixels."""
COLUMNS = 4
DRAWN = 200
"""Outlines per bucket; more would only be a solid block."""
PAPER, INK, FAINT, BUCKET = "#ffffff", "#1c2733", "#64748b", "#2563eb"
TITLE, LABEL = 22, 15


def draw_plan(records: Sequence[ImageRecord], placements: Sequence[Placement]) -> Image.Image:
    """One field per bucket in use, from tall to wide, all to the same scale; grey is what is cropped away."""
    rows = plan_table(records, placements)
    members: dict[Size, list[Placement]] = defaultdict(list)
    for placement in placements:
        members[placement.bucket].append(placement)
    columns = max(1, min(COLUMNS, len(rows)))
    sheet = Image.new("RGB", (CELL[0] * columns + 40, 80 + CELL[1] * max(1, math.ceil(len(rows) / columns))), PAPER)
    pen = ImageDraw.Draw(sheet)
    samples = sum(row.samples for row in rows)
    title = f"{counted(len(records), 'picture')} in {counted(len(rows), 'bucket')}"
    pen.text((24, 22), title, INK, ImageFont.load_default(TITLE))
    pen.text(
        (24, 50), f"{counted(samples, 'sample')} per epoch; grey is cropped away", FAINT, ImageFont.load_default(LABEL)
    )
    longest = max((max(row.bucket) for row in rows), default=1)
    reach = max((_reach(placement) for placement in placements if placement.zoomed), default=1.0)
    scale = min((CELL[0] - 80) / longest, (min(CELL[0], CELL[1] - 86) - 12) / 2 / reach)
    for place, row in enumerate(rows):
        corner = (20 + place % columns * CELL[0], 80 + place // columns * CELL[1])
        _draw_bucket(sheet, corner, row, members[row.bucket], scale)
    return sheet


def save_plan(records: Sequence[ImageRecord], placements: Sequence[Placement], path: Path) -> Path:
    """Write `draw_plan` as a PNG.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        draw_plan(records, placements).save(path, format="PNG", optimize=True)
    except OSError as error:
        raise StorageError(f"{shown(str(path))} cannot be written ({error.strerror or error}).") from error
    return path


def _reach(placement: Placement) -> float:
    """From the middle of the bucket to the farthest edge of the resized picture, pixels."""
    sides = zip(placement.bucket, placement.crop_top_left, placement.resize, strict=True)
    return max(max(start + size / 2, whole - start - size / 2) for size, start, whole in sides)


def _draw_bucket(
    sheet: Image.Image, corner: tuple[int, int], row: BucketRow, placements: list[Placement], scale: float
) -> None:
    centre = (corner[0] + CELL[0] / 2, corner[1] + (CELL[1] - 90) / 2)
    tall, wide = (side * scale for side in row.bucket)
    left, top = centre[0] - wide / 2, centre[1] - tall / 2
    # keep: a layer of its own per bucket, because what reaches out of its field is cut off there.
    layer = Image.new("RGBA", (CELL[0] - 12, CELL[1] - 84))
    left, top = left - corner[0] - 6, top - corner[1] - 4
    drawn = placements[:DRAWN]
    faint = max(14, 90 // max(1, len(drawn)))
    for placement in drawn:
        x, y = left - placement.crop_top_left[1] * scale, top - placement.crop_top_left[0] * scale
        box = (x, y, x + placement.resize[1] * scale, y + placement.resize[0] * scale)
        veil = Image.new("RGBA", layer.size)
        ImageDraw.Draw(veil).rectangle(box, fill=(148, 163, 184, faint), outline=(100, 116, 139, 110))
        layer.alpha_composite(veil)
    inner = Image.new("RGBA", layer.size)
    ImageDraw.Draw(inner).rectangle(
        (left, top, left + wide, top + tall), fill=(37, 99, 235, 46), outline=BUCKET, width=3
    )
    layer.alpha_composite(inner)
    sheet.paste(layer, (corner[0] + 6, corner[1] + 4), layer)
    words = ImageDraw.Draw(sheet)
    many = f" x {row.samples / row.pictures:.3g}" if row.samples != row.pictures else ""
    lines = (
        (f"{row.bucket[1]} x {row.bucket[0]}", INK, TITLE - 3),
        (f"{counted(row.pictures, 'picture')}{many}", INK, LABEL),
        (f"{row.mean_lost:.1%} cropped, at most {row.max_lost:.1%}", FAINT, LABEL),
    )
    y = corner[1] + CELL[1] - 76
    for text, ink, size in lines:
        words.text((centre[0], y), text, ink, ImageFont.load_default(size), anchor="ma")
        y += size + 6
