"""Captions in numbers: how long they are, which words and tags they hold, which of them repeat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from data_tools.records import ImageRecord
from data_tools.report.tokens import Tokenizers

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# Words that say nothing about a picture; they would fill the top of every list.
COMMON = frozenset(
    {
        *("a", "an", "and", "are", "as", "at", "be", "behind", "beside", "between", "by", "for", "from", "has", "have"),
        *("he", "her", "his", "in", "into", "is", "it", "its", "near", "of", "on", "or", "over", "she", "the", "their"),
        *("there", "they", "this", "to", "under", "up", "was", "were", "which", "while", "with"),
    }
)
TOP = 40
TAG_SHARE = 0.5
"""Captions with two commas or more; from this share on they are lists of tags."""


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case."""
    return WORD.findall(caption.lower())


def caption_facts(records: Sequence[ImageRecord], tokenizers: Tokenizers) -> dict[str, Any]:
    """Lengths, words, tags and repetitions of all captions; empty lists where there are no captions."""
    captions = [caption for record in records for caption in record.captions]
    filled = [caption for caption in captions if caption]
    tagged = sum(caption.count(",") >= 2 for caption in filled) > TAG_SHARE * len(filled) > 0
    pictures = sum(bool(record.captions) for record in records)
    counts = {name: [tokenizer.count(caption) for caption in captions] for name, tokenizer in tokenizers.items()}
    cut = {i for name, numbers in counts.items() for i, number in enumerate(numbers) if number > tokenizers[name].room}
    return {
        "captions": len(captions),
        "empty": len(captions) - len(filled),
        "pictures_without": len(records) - pictures,
        "words": [len(words_of(caption)) for caption in captions],
        "tokens": {name: {"room": tokenizers[name].room, "counts": numbers} for name, numbers in counts.items()},
        "cut": len(cut),
        "frequent_words": _frequent(
            ({word for caption in r.captions for word in words_of(caption)} - COMMON for r in records), pictures
        ),
        "frequent_tags": _frequent(
            ({tag for c in r.captions for tag in _tags(c)} for r in records), pictures
        ) if tagged else [],
        "repeated": [
            {"caption": caption, "times": times} for caption, times in Counter(filled).most_common(10) if times > 1
        ],
    }  # fmt: skip


def _tags(caption: str) -> set[str]:
    return {tag.strip().lower() for tag in caption.split(",") if tag.strip()}


def _frequent(sets: Iterable[set[str]], pictures: int) -> list[dict[str, Any]]:
    """The most frequent ones, counted once per picture: [{"text", "pictures", "share"}]."""
    counts: Counter[str] = Counter()
    for found in sets:
        counts.update(found)
    best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    return [{"text": text, "pictures": count, "share": count / max(1, pictures)} for text, count in best]
