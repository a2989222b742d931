"""A contact sheet shows every picture, in its place, with its label."""

from __future__ import annotations

import numpy as np
from PIL import Image

from finetune.sampling.grid import EMPTY, Row, contact_sheet

RED, BLUE = "#d01010", "#1010d0"


def square(colour: str, width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def share(sheet: Image.Image, colour: str) -> int:
    """How many pixels of a sheet have exactly this colour."""
    wanted = np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]
    return int((np.asarray(sheet) == wanted).all(axis=-1).sum())


def test_small_pictures_are_enlarged_and_all_are_there():
    rows = [Row("before", [square(RED), square(RED)]), Row("after", [square(BLUE), None], note="step 400")]
    sheet = contact_sheet(
        rows, columns=["a toy", "a toy on the beach " * 6], title="toy", subtitle="demo base"
    )
    inner = 192 * 192
    assert 0.9 * 2 * inner < share(sheet, RED) <= 2 * inner
    assert 0.9 * inner < share(sheet, BLUE) <= inner
    assert share(sheet, EMPTY) == inner


def test_labels_never_cover_pictures():
    """The same pictures with long and short labels keep the same number of their pixels."""
    short = contact_sheet([Row("a", [square(RED)])], columns=["b"])
    long = contact_sheet(
        [Row("a very long label indeed " * 5, [square(RED)], note="n" * 60)], columns=["b " * 40]
    )
    assert share(short, RED) == share(long, RED)


def test_large_and_unequal_pictures_fit():
    sheet = contact_sheet([Row("", [square(RED, 1024, 512), square(BLUE, 512, 1024)])], columns=["", ""])
    assert sheet.width < 900
    assert share(sheet, RED) > 0
    assert share(sheet, BLUE) > 0


def test_scale_and_pixels_kept():
    """With smooth=False an enlarged checkerboard keeps its two colours and gains no others inside."""
    board = Image.fromarray(np.indices((8, 8)).sum(axis=0).astype(np.uint8) % 2 * 255)
    sheet = contact_sheet([Row("", [board])], columns=[""], scale=10, smooth=False)
    tile = np.asarray(sheet.convert("L"))[33:110, 33:110]
    assert sheet.size == (64 + 80, 64 + 80)
    assert set(np.unique(tile)) == {0, 255}
