"""What a text encoder does not read of a caption; exact with its tokenizer, a lower bound without."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from data_tools.report.tokens import CLIP_ROOM, Tokenizer, Tokenizers

# Source: the pattern of the CLIP tokenizer, which never joins two of these into one token; the bytes of rare
# words become several. The digit class stands for \p{N}.
CLIP_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
MARKS = 2
"""The start and the end of a text are tokens of their own."""


@dataclass(frozen=True)
class Count:
    """Tokens of one caption for one text encoder."""

    encoder: str
    tokens: int
    room: int
    lost: str
    """The end of the caption that has no effect; empty when all of it is read."""


def at_least() -> Tokenizers:
    """Without a tokenizer: the fewest tokens that any CLIP vocabulary can make of a caption."""
    return {"CLIP, at least": Tokenizer(lambda text: len(CLIP_PIECES.findall(text)) + MARKS, CLIP_ROOM)}


def count(caption: str, tokenizers: Tokenizers) -> list[Count]:
    """How many tokens a caption is, for each encoder, and what falls off."""
    return [
        Count(name, tokenizer.count(caption), tokenizer.room, lost_end(caption, tokenizer))
        for name, tokenizer in tokenizers.items()
    ]


def lost_end(caption: str, tokenizer: Tokenizer) -> str:
    """The words behind the longest beginning that fits; a word that is cut in the middle is lost."""
    if tokenizer.count(caption) <= tokenizer.room:
        return ""
    words = caption.split(" ")
    ends = list(accumulate(len(word) + 1 for word in words))
    fits = bisect_right(ends, tokenizer.room, key=lambda end: tokenizer.count(caption[: end - 1]))
    return caption[ends[fits - 1] if fits else 0 :]
