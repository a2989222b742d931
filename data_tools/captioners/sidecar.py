"""Captions from files beside the pictures: `cat.png` takes `cat.txt`, `cat.caption` or `cat.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from data_tools.captioners.base import Answer, Caption
from data_tools.captioners.columns import Find, empty_caption, has_text, parse_columns
from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular
from data_tools.folder import Listing
from data_tools.names import stem
from data_tools.rows import Finder, json_object
from data_tools.shelves import Lookup
from data_tools.text import MAX_CAPTION_BYTES, decode_text, split_captions


def sidecar(listing: Listing, template: str | None) -> Answer:
    """Read the caption files of exactly the same stem; every non-blank line of a text is one caption.

    A `.json` file may hold `text` (or `caption`, `prompt`), `tags`, `role`, `repeats` and `mask_file_name`;
    one without any caption is noted and left aside. A blank file is an empty caption and is listed. Several
    files for one picture must agree.
    """
    answer = Answer()
    find, orphans = Finder(listing), list[str]()
    files = Lookup(listing.sidecars, stem)
    for name in listing.sidecars:
        bare = stem(name)
        group = files(bare)
        if name != group[0]:
            continue
        said = {file: caption for file in group if (caption := _said(answer, listing, file, find)) is not False}
        pictures = listing.by_stem(bare)
        if not pictures:
            orphans.extend(group)
        elif said:
            _settle(answer, pictures, said)
    answer.orphans = orphans
    return answer


def _said(answer: Answer, listing: Listing, name: str, find: Find) -> Caption | Literal[False] | None:
    """What a file says; None for one that cannot be read, False for one that does not speak of captions."""
    try:
        said = _read(listing, name, find)
    except RefusedError as refusal:
        answer.problems.append(refusal.problem(name))
        return None
    if said is None:
        answer.problems.append(_no_caption(name))
        return False
    if said.captions == ("",):
        answer.problems.append(empty_caption(name))
    return said


def _settle(answer: Answer, pictures: Sequence[str], files: Mapping[str, Caption | None]) -> None:
    """Give the pictures of one stem what the files of this stem say, if they agree."""
    found = [said for said in files.values() if said is not None]
    if len(found) < len(files):
        answer.failed.update(pictures)
    elif len({said.captions for said in found}) > 1:
        for picture in pictures:
            answer.fail(
                picture,
                Problem(
                    picture,
                    f"has two captions that differ: {' and '.join(files)}",
                    "nothing says which one counts",
                    "remove one of the two",
                ),
            )
    else:
        # keep: the .json file, where there is one, because it may also say role, repeats and mask.
        chosen = next((name for name in files if name.lower().endswith(".json")), next(iter(files)))
        said: Caption = files[chosen] or found[0]
        for picture in pictures:
            answer.captions[picture] = said
    if len(pictures) > 1:
        answer.problems.append(
            Problem(
                next(iter(files)),
                f"is the caption of {len(pictures)} pictures: {', '.join(pictures)}",
                "they share the stem",
                "rename one of them if their captions should differ",
                "warning",
            )
        )


def _read(listing: Listing, name: str, find: Find) -> Caption | None:
    """What the file says; None for a .json file that says nothing of a caption, as downloaders write them."""
    # keep: not `root / name`, which takes half as long as reading the file.
    text = decode_text(read_regular(os.path.join(listing.root, name), MAX_CAPTION_BYTES))
    if not name.lower().endswith(".json"):
        return Caption(split_captions(text), "sidecar")
    values = json_object(text)
    # keep: without its sha256, which is that of the picture before some downloader resized it.
    return replace(parse_columns(values, "sidecar", find), sha256=None) if has_text(values) else None


def _no_caption(name: str) -> Problem:
    return Problem(name, "holds no caption", "it has no text, caption, prompt or tags", "add one if it should", "note")
