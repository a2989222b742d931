"""What the columns of a metadata row, or the keys of a .json file beside a picture, say about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from data_tools.captioners.base import Caption
from data_tools.errors import Problem, RefusedError
from data_tools.records import ROLES, Role
from data_tools.rows import MASK_COLUMNS
from data_tools.text import split_captions
from data_tools.verdicts import parse_focus, parse_verdict

TEXT_COLUMNS = ("text", "caption", "captions", "prompt")
"""The first one that is there holds the captions."""
TAGS = "tags"
"""Kohya's second column: it follows the caption after a comma, or stands alone."""
MAX_REPEATS = 1_000_000
LOSS_WEIGHT = "loss_weight"

Find = Callable[[object], str]


def has_text(values: dict[str, Any]) -> bool:
    """Whether any column is a caption's."""
    return any(name in values for name in (*TEXT_COLUMNS, TAGS))


def consumed(values: dict[str, Any]) -> set[str]:
    """The columns that a record has taken in, so that written again they would be said twice."""
    text = next((name for name in TEXT_COLUMNS if name in values), None)
    return {name for name in (text, TAGS, *MASK_COLUMNS) if name is not None}


def parse_columns(values: dict[str, Any], source: str, find: Find) -> Caption:
    """The captions of a row and what else it says: `role`, `repeats`, `mask_file_name` (or `mask_file`), `sha256`.

    Args:
        values: columns by name; a text of several lines, or a list of texts, is several captions.
        source: where the row stands, for the record.
        find: from a name written in the row to the name on disk.

    Raises:
        RefusedError: a column that is missing or holds the wrong kind of value.
    """
    role = values.get("role") or "instance"
    if role not in ROLES:
        raise RefusedError(
            f"has role {role!r}", f"roles are {' and '.join(ROLES)}", "write one of them, or leave it out"
        )
    digest = values.get("sha256") or None
    verdict, reasons = parse_verdict(values)
    return Caption(
        captions=_captions(values),
        source=source,
        role=_role(role),
        repeats=_repeats(values.get("repeats")),
        loss_weight=_loss_weight(values.get(LOSS_WEIGHT)),
        mask_file=_mask(values, find),
        sha256=digest if isinstance(digest, str) else None,
        verdict=verdict,
        verdict_reasons=reasons,
        focus=parse_focus(values),
    )


def _role(role: str) -> Role:
    """Narrow a checked string to the type."""
    return "class" if role == "class" else "instance"


def _mask(values: dict[str, Any], find: Find) -> str | None:
    named = {values[column] for column in MASK_COLUMNS if isinstance(values.get(column), str) and values[column]}
    odd = [values[column] for column in MASK_COLUMNS if not isinstance(values.get(column), str | None)]
    if len(named) > 1 or odd:
        raise RefusedError(
            f"names {' and '.join(repr(name) for name in [*sorted(named), *odd])} as its mask",
            f"{' and '.join(MASK_COLUMNS)} are one column under two names, and hold one file's name",
            "keep one of them",
        )
    return find(named.pop()) if named else None


def _captions(values: dict[str, Any]) -> tuple[str, ...]:
    column = next((name for name in TEXT_COLUMNS if name in values), None)
    tags = _tags(values)
    if column is None:
        if tags is None:
            raise RefusedError(
                "has no text", f"captions are read from {', '.join(TEXT_COLUMNS)} or {TAGS}", "add one to the row"
            )
        return split_captions(tags)[:1]
    value = values[column]
    if value is None and tags:
        return split_captions(tags)[:1]
    texts = value if isinstance(value, list) and value else [value]
    if not all(isinstance(text, str) for text in texts):
        kind = "null" if value is None else type(value).__name__
        raise RefusedError(
            f"has a {column} that is {kind}, not text",
            "a caption is words in quotes",
            'write "" if an empty caption is meant',
        )
    captions = [caption for text in texts for caption in split_captions(text) if caption]
    if tags and captions:
        captions = [f"{caption}, {tags}" for caption in captions]
    return tuple(captions) or ((tags,) if tags else ("",))


def _tags(values: dict[str, Any]) -> str | None:
    """The tags in one line, or None when there is no such column."""
    value = values.get(TAGS)
    if value is None:
        return None
    tags = value.split("\n") if isinstance(value, str) else value
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RefusedError(
            f"has tags that are {type(value).__name__}, not text",
            "tags are words with commas between them, or a list of words",
            "write them so",
        )
    return split_captions(" ".join(", ".join(tag.strip() for tag in tags if tag.strip()).split()))[0]


def _repeats(value: object) -> int | None:
    if value is None or value == "":
        return None
    whole = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value
    if isinstance(whole, bool) or not isinstance(whole, int) or not 1 <= whole <= MAX_REPEATS:
        raise RefusedError(
            f"has repeats {value!r}", f"it is a whole number from 1 to {MAX_REPEATS:,}", "write such a number"
        )
    return whole


def _loss_weight(value: object) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        raise RefusedError(
            f"has {LOSS_WEIGHT} {value!r}", "a loss is multiplied by a number from 0 up", "write such a number"
        )
    return weight


def empty_caption(name: str) -> Problem:
    """The warning about a caption without a word."""
    return Problem(
        name,
        "is an empty caption",
        "the picture is trained as an answer to no words at all",
        "write what it shows, unless that is meant",
        "warning",
    )
