"""Captions from metadata.jsonl, .csv or .parquet at the top of the folder (the imagefolder convention)."""

from __future__ import annotations

from data_tools.captioners.base import Answer, Caption
from data_tools.captioners.columns import empty_caption, parse_columns
from data_tools.errors import Problem, RefusedError
from data_tools.folder import Listing
from data_tools.rows import Finder, Row, match_rows, read_rows


def metadata(listing: Listing, template: str | None) -> Answer:
    """Read the rows: `file_name`, `text` (or `caption`), and `role`, `repeats`, `mask_file_name` where given.

    A text of several lines, or a list of texts, is several captions. Rows without a picture, pictures without
    a row and second rows of a picture are listed.
    """
    answer = Answer()
    if not listing.metadata:
        answer.problems.append(
            Problem(
                "",
                "there is no metadata.jsonl, .csv or .parquet in the top folder",
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
    find = Finder(listing)
    for found in match_rows(read_rows(listing.root, listing.metadata[0]), find):
        if isinstance(found, Problem):
            answer.problems.append(found)
            continue
        name, row = found
        try:
            caption = parse_row(row, find)
        except RefusedError as refusal:
            answer.fail(name, refusal.problem(f"{name} ({row.place})"))
            continue
        answer.captions[name] = caption
        if caption.mask_file:
            answer.masks.add(caption.mask_file)
        if "" in caption.captions:
            answer.problems.append(empty_caption(f"{name} ({row.place})"))
    answer.masks.update(listing.masks.values())
    for name in answer.masks:
        if name in answer.captions:
            answer.fail(
                name, Problem(name, "is a mask and has a row of its own", "a mask is not trained on", "remove its row")
            )
            del answer.captions[name]
    for name in list(answer.missing(listing.pictures)):
        answer.fail(
            name,
            Problem(
                name,
                f"has no row in {listing.metadata[0]}",
                "so it has no caption",
                "add a row, move it out of the folder, or take the captions from elsewhere (--captions sidecar)",
            ),
        )
    return answer


def parse_row(row: Row, find: Finder) -> Caption:
    """The captions of a row and what else it says.

    Raises:
        RefusedError: a column that is missing or holds the wrong kind of value.
    """
    return parse_columns(row.values, "metadata", find)
