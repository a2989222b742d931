"""Captions from file names: `sks_dog-on grass (2).png` -> "sks dog on grass". Only when asked for."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from data_tools.captioners.base import Answer, Caption
from data_tools.errors import Problem, RefusedError
from data_tools.folder import Listing
from data_tools.text import split_captions

COUNTER = re.compile(r"[\s._-]*(\(\d+\)|\d+)$")
# Names that cameras, phones and messengers give; they say nothing about the picture.
CAMERA = re.compile(
    r"(img|image|dsc[fn]?|pxl|vid|mvimg|photo|picture|pic|screenshot|scan|untitled|whatsapp image.*|p)", re.IGNORECASE
)


def filename(listing: Listing, template: str | None) -> Answer:
    """Each file's name is its caption: `_`, `-` and `+` become blanks, counters at the end are dropped."""
    answer = Answer()
    for name in listing.pictures:
        bare = PurePosixPath(name).stem
        while COUNTER.search(bare):
            bare = COUNTER.sub("", bare)
        words = " ".join(re.sub(r"[_+-]+", " ", bare).split())
        if not words or CAMERA.fullmatch(words):
            answer.fail(
                name,
                Problem(
                    name,
                    "has a name that describes nothing",
                    "it was asked to be the caption",
                    "rename the file, or write a caption file beside it",
                ),
            )
            continue
        try:
            answer.captions[name] = Caption((split_captions(words)[0],), "filename")
        except RefusedError as refusal:
            answer.fail(name, refusal.problem(name))
    return answer
