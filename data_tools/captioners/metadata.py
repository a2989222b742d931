"""Captions from metadata.jsonl or metadata.csv at the top of the folder (the imagefolder convention)."""

from __future__ import annotations

from typing import Any

from data_tools.captioners.base import Answer, Caption
from data_tools.captioners.sidecar import empty_caption
from data_tools.errors import Problem, RefusedError
from data_tools.folder import Listing
from data_tools.records import ROLES, Role
from data_tools.rows import MASK_COLUMN, Finder, Row, match_rows, read_rows
from data_tools.text import split_captions

TEXT_COLUMNS = ("text", "caption")
MAX_REPEATS = 1_000_000


def metadata(listing: Listing, template: str | None) -> Answer:
    """Read the rows: `file_name`, `text` (or `caption`), and `role`, `repeats`, `mask_file_name` where given.

    A text of several lines, or a list of texts, is several captions. Rows without a picture, pictures without
    a row and second rows of a picture are listed.
    """
    answer = Answer(used=set(listing.metadata))
    if not listing.metadata:
        answer.problems.append(
            Problem(
                "",
                "there is no metadata.jsonl or metadata.csv in the top folder",
                "captions were asked from there",
                "write one, or choose other captions",
            )
        )
        answer.failed.update(listing.pictures)
        return answer
    if len(listing.metadata) > 1:
        answer.problems.append(
            Problem(
                listing.metadata[1],
                f"stands beside {listing.metadata[0]}",
                "two files may disagree, and `datasets` refuses both",
                "keep one of them",
            )
        )
    found = read_rows(listing.root, listing.metadata[0])
    matched, problems = match_rows(found.rows, listing)
    answer.problems += found.problems + problems
    find = Finder(listing)
    for name, row in matched.items():
        try:
            answer.captions[name] = parse_row(row, find)
        except RefusedError as refusal:
            answer.fail(name, refusal.problem(f"{name} ({row.place})"))
            continue
        if "" in answer.captions[name].captions:
            answer.problems.append(empty_caption(f"{name} ({row.place})"))
    masks = {caption.mask_file for caption in answer.captions.values() if caption.mask_file}
    answer.used |= masks
    for name in masks & answer.captions.keys():
        answer.fail(
            name,
            Problem(name, "is a mask and has a row of its own", "a mask is not trained on", "remove its row"),
        )
        del answer.captions[name]
    for name in listing.pictures:
        if name not in matched and name not in masks:
            answer.fail(
                name,
                Problem(
                    name,
                    f"has no row in {found.name}",
                    "so it has no caption",
                    "add a row, move it out of the folder, or take the captions from elsewhere "
                    "(--captions sidecar)",
                ),
            )
    return answer


def parse_row(row: Row, find: Finder) -> Caption:
    """The captions of a row and what else it says.

    Raises:
        RefusedError: a column that is missing or holds the wrong kind of value.
    """
    role = row.values.get("role") or "instance"
    if role not in ROLES:
        raise RefusedError(
            f"has role {role!r}", f"roles are {' and '.join(ROLES)}", "write one of them, or leave it out"
        )
    mask = row.values.get(MASK_COLUMN) or None
    digest = row.values.get("sha256") or None
    return Caption(
        captions=_captions(row.values),
        source="metadata",
        role=_role(role),
        repeats=_repeats(row.values.get("repeats")),
        mask_file=None if mask is None else find(mask),
        sha256=digest if isinstance(digest, str) else None,
    )


def _role(role: str) -> Role:
    """Narrow a checked string to the type."""
    return "class" if role == "class" else "instance"


def _captions(values: dict[str, Any]) -> tuple[str, ...]:
    column = next((name for name in TEXT_COLUMNS if name in values), None)
    if column is None:
        raise RefusedError(
            "has no text", f"captions are read from {' or '.join(TEXT_COLUMNS)}", "add one to the row"
        )
    value = values[column]
    texts = value if isinstance(value, list) and value else [value]
    if not all(isinstance(text, str) for text in texts):
        kind = "null" if value is None else type(value).__name__
        raise RefusedError(
            f"has a {column} that is {kind}, not text",
            "a caption is words in quotes",
            'write "" if an empty caption is meant',
        )
    captions = [caption for text in texts for caption in split_captions(text)]
    return tuple(caption for caption in captions if caption) or ("",)


def _repeats(value: object) -> int | None:
    if value is None or value == "":
        return None
    whole = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value
    if isinstance(whole, bool) or not isinstance(whole, int) or not 1 <= whole <= MAX_REPEATS:
        raise RefusedError(
            f"has repeats {value!r}", f"it is a whole number from 1 to {MAX_REPEATS:,}", "write such a number"
        )
    return whole
