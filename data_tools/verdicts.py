"""Verdicts in the manifest: what is kept, looked at or left out, said so that people can read and change it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from data_tools.errors import Problem, RefusedError
from data_tools.records import RECORD, Focus, ImageRecord, Verdict
from data_tools.shelves import Shelf

VERDICT, REASONS, SUGGESTED = "verdict", "verdict_reasons", "verdict_suggested"
"""Manifest columns: the verdict that counts, its reasons, and what `clean` said last (differs if a person decided)."""
FOCUS_X, FOCUS_Y, FOCUS_WIDTH, FOCUS_HEIGHT = "focus_x", "focus_y", "focus_width", "focus_height"
BETWEEN = "; "
WORDS: dict[str, Verdict] = {"keep": "keep", "review": "review", "drop": "drop"}
"""From mild to grave."""


def parse_verdict(values: Mapping[str, Any]) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict of a manifest row and its reasons; a row without one is kept.

    Raises:
        RefusedError: a word that is no verdict.
    """
    written = values.get(VERDICT) or "keep"
    verdict = WORDS.get(written) if isinstance(written, str) else None
    if verdict is None:
        raise RefusedError(
            f"has verdict {written!r}", f"verdicts are {', '.join(WORDS)}", "write one of them, or leave it out (keep)"
        )
    reasons = values.get(REASONS)
    return verdict, tuple(reasons.split(BETWEEN)) if isinstance(reasons, str) and reasons else ()


def parse_focus(values: Mapping[str, Any]) -> Focus | None:
    """What a crop keeps in its middle and zooms to; None when the row names nothing.

    Raises:
        RefusedError: one number of a pair is missing, or outside of 0 to 1.
    """
    where = "the point is a share of the width from the left and of the height from the top"
    point = _shares(values, FOCUS_X, FOCUS_Y, where)
    size = _shares(values, FOCUS_WIDTH, FOCUS_HEIGHT, "what is zoomed to is a share of the width and of the height")
    if point is None and size is None:
        return None
    if point is None or (size is not None and min(size) == 0):
        raise RefusedError(
            f"has {FOCUS_WIDTH}={size and size[0]} and {FOCUS_HEIGHT}={size and size[1]}",
            "what is zoomed to has a middle and a size",
            f"write {FOCUS_X} and {FOCUS_Y} as well, and numbers above 0; or leave the size out",
        )
    return Focus(*point, *(size or ()))


def _shares(values: Mapping[str, Any], first: str, second: str, why: str) -> tuple[float, float] | None:
    written = [values.get(first), values.get(second)]
    if all(value is None or value == "" for value in written):
        return None
    try:
        across, down = (float(value) for value in written)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        across = down = -1.0
    if not (0 <= across <= 1 and 0 <= down <= 1):
        raise RefusedError(
            f"has {first}={written[0]!r} and {second}={written[1]!r}",
            why,
            "write two numbers from 0 to 1, or leave both out",
        )
    return across, down


def columns_of(record: ImageRecord) -> dict[str, Any]:
    """The manifest columns of a record's verdict and focus."""
    across, down, wide, tall = record.focus or (None, None, None, None)
    return {
        VERDICT: record.verdict,
        REASONS: BETWEEN.join(record.verdict_reasons),
        FOCUS_X: across,
        FOCUS_Y: down,
        FOCUS_WIDTH: wide or None,
        FOCUS_HEIGHT: tall or None,
    }


def without_dropped(records: Iterable[ImageRecord]) -> tuple[Shelf[ImageRecord], list[Problem]]:
    """The records to train on, and a note on each that its verdict leaves out, so that nothing goes in silence."""
    kept, left_out = Shelf[ImageRecord]((), *RECORD), []
    for record in records:
        if record.verdict != "drop":
            kept.append(record)
            continue
        left_out.append(
            Problem(
                record.file_name,
                "is left out by its verdict",
                BETWEEN.join(record.verdict_reasons) or "it says drop",
                "write keep in the manifest's column `verdict` to train on it",
                "note",
            )
        )
    return kept, left_out
