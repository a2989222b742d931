"""Where a crop should look: the middle of what a mask marks, written as the focus of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.errors import Problem, RefusedError, stop_for_errors
from data_tools.images import BLACK, read_picture
from data_tools.pool import death, in_workers
from data_tools.quality import reduced
from data_tools.records import ImageRecord

SIDE = 256
"""Longer side at which masks are looked at, pixels; the middle is exact to about half a percent."""


def mask_focus(mask: Image.Image) -> tuple[float, float] | None:
    """The centre of mass of a mask's brightness, as shares of width and height; None when all of it is black."""
    weights = np.asarray(reduced(mask.convert("L"), SIDE), dtype=np.float64)
    total = weights.sum()
    if total == 0:
        return None
    down, across = ((np.arange(size) + 0.5) / size for size in weights.shape)
    return round(float(weights.sum(axis=0) @ across / total), 4), round(float(weights.sum(axis=1) @ down / total), 4)


def focus_on_masks(root: Path, records: Sequence[ImageRecord], workers: int | None = None) -> list[ImageRecord]:
    """The records, those with a mask focused on what it marks; a focus that is there already stays.

    Raises:
        DataToolsError: naming every mask that cannot be read.
    """

    def work(record: ImageRecord) -> ImageRecord | Problem:
        if record.mask_file is None or record.focus is not None:
            return record
        try:
            mask = read_picture(root / record.mask_file, BLACK)
        except RefusedError as refusal:
            return refusal.problem(record.mask_file)
        return replace(record, focus=mask_focus(mask))

    results = list(
        in_workers(work, records, workers, lambda record, code: death(record.mask_file or record.file_name, code))
    )
    problems = [result for result in results if isinstance(result, Problem)]
    stop_for_errors("These masks cannot be used:", problems)
    return [result for result in results if isinstance(result, ImageRecord)]
