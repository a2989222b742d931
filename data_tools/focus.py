"""Where a crop should look: the middle of what a mask marks, or all of it; written as the focus of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.errors import Problem, RefusedError, stop_for_errors
from data_tools.images import BLACK, read_picture
from data_tools.pool import death, in_workers
from data_tools.quality import reduced
from data_tools.records import Focus, ImageRecord

SIDE = 256
"""Longer side at which masks are looked at, pixels; the middle is exact to about half a percent."""
STRAY = 0.01
"""Share of a mask that may lie beyond each edge of what is zoomed to: specks that a model marked elsewhere."""


def mask_focus(mask: Image.Image, margin: float | None = None) -> Focus | None:
    """What a mask's brightness marks; None when all of it is black.

    Args:
        mask: as large as its picture, or of its shape.
        margin: None gives the centre of mass. A number gives the middle of what is marked and its size, widened on
            each side by this share of it.
    """
    weights = np.asarray(reduced(mask.convert("L"), SIDE), dtype=np.float64)
    if not weights.any():
        return None
    across, down = (_along(weights.sum(axis=axis), margin) for axis in (0, 1))
    return Focus(across[0], down[0], across[1], down[1])


def _along(weights: NDArray[np.float64], margin: float | None) -> tuple[float, float]:
    """Middle and size of what is marked along one side, as shares of it; size 0 without a margin."""
    shares = weights / weights.sum()
    if margin is None:
        return round(float(shares @ (np.arange(len(shares)) + 0.5) / len(shares)), 4), 0.0
    marked = np.flatnonzero((shares.cumsum() > STRAY) & (shares[::-1].cumsum()[::-1] > STRAY))
    first, last = int(marked[0]) / len(shares), (int(marked[-1]) + 1) / len(shares)
    return round((first + last) / 2, 4), round(min(1.0, (last - first) * (1 + 2 * margin)), 4)


def focus_on_masks(
    root: Path, records: Sequence[ImageRecord], workers: int | None = None, margin: float | None = None
) -> list[ImageRecord]:
    """The records, those with a mask focused on what it marks; with a margin zoomed to it, see `mask_focus`.

    A focus that is there already stays, unless it is what an earlier call found in the mask and is zoomed now.

    Raises:
        DataToolsError: naming every mask that cannot be read.
    """

    def work(record: ImageRecord) -> ImageRecord | Problem:
        if record.mask_file is None or (record.focus is not None and margin is None):
            return record
        try:
            mask = read_picture(root / record.mask_file, BLACK)
        except RefusedError as refusal:
            return refusal.problem(record.mask_file)
        found = {focus[:2] for focus in (mask_focus(mask), mask_focus(mask, 0.0)) if focus}
        by_hand = record.focus is not None and record.focus[:2] not in found
        return record if by_hand else replace(record, focus=mask_focus(mask, margin))

    results = list(
        in_workers(work, records, workers, lambda record, code: death(record.mask_file or record.file_name, code))
    )
    problems = [result for result in results if isinstance(result, Problem)]
    stop_for_errors("These masks cannot be used:", problems)
    return [result for result in results if isinstance(result, ImageRecord)]
