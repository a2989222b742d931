"""Captions from text files beside the pictures: `cat.png` takes `cat.txt` or `cat.caption`."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from pathlib import PurePosixPath

from data_tools.captioners.base import Answer, Caption
from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular
from data_tools.folder import Listing
from data_tools.text import MAX_CAPTION_BYTES, decode_text, split_captions


def sidecar(listing: Listing, template: str | None) -> Answer:
    """Read the caption file of exactly the same stem; every non-blank line is one caption.

    A blank file is an empty caption and is listed. Both `.txt` and `.caption` for one picture must agree.
    """
    answer = Answer()
    files = defaultdict(list)
    for name in listing.sidecars:
        files[stem(name)].append(name)
    texts = {name: _read(listing, name, answer) for names in files.values() for name in names}
    pictures = defaultdict(list)
    for picture in listing.pictures:
        pictures[stem(picture)].append(picture)
    for key in [key for key in pictures if key in files]:
        answer.used.update(files[key])
        found = [texts[name] for name in files[key]]
        if len(set(found)) > 1 and None not in found:
            for picture in pictures[key]:
                answer.fail(
                    picture,
                    Problem(
                        picture,
                        f"has two captions that differ: {' and '.join(files[key])}",
                        "nothing says which one counts",
                        "remove one of the two",
                    ),
                )
        elif found[0] is None or None in found:
            answer.failed.update(pictures[key])
        else:
            answer.captions.update({picture: Caption(found[0], "sidecar") for picture in pictures[key]})
        if len(pictures[key]) > 1:
            answer.problems.append(
                Problem(
                    files[key][0],
                    f"is the caption of {len(pictures[key])} pictures: {', '.join(pictures[key])}",
                    "they share the stem",
                    "rename one of them if their captions should differ",
                    "warning",
                )
            )
    return answer


def stem(name: str) -> str:
    """The name without its last ending, composed, so that caption and picture may be spelled NFC and NFD."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def _read(listing: Listing, name: str, answer: Answer) -> tuple[str, ...] | None:
    try:
        captions = split_captions(decode_text(read_regular(listing.root / name, MAX_CAPTION_BYTES)))
    except RefusedError as refusal:
        answer.problems.append(refusal.problem(name))
        return None
    if captions == ("",):
        answer.problems.append(empty_caption(name))
    return captions


def empty_caption(name: str) -> Problem:
    """The warning about a caption without a word."""
    return Problem(
        name,
        "is an empty caption",
        "the picture is trained as an answer to no words at all",
        "write what it shows, unless that is meant",
        "warning",
    )
