"""Words that most captions of a subject share: they learn what the trigger should.

In training every word of a caption takes its part of what the pictures have in common. If nearly all captions of a
red-haired woman say "red hair", the trigger learns a woman and the words "red hair" keep the hair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from data_tools.errors import Problem
from data_tools.report.words import COMMON, words_of

SHARE = 0.5
"""A word in more than this part of the pictures' captions is told."""
FEWEST = 4
"""Below so many pictures every word is frequent."""
SHOWN = 8
# What a picture is, rather than what it shows: such a word says nothing about the subject.
MEDIUM = frozenset(
    {
        *("photo", "photograph", "picture", "image", "painting", "drawing", "illustration", "closeup", "close-up"),
        *("close", "view", "front", "side", "background", "solo", "simple", "shot", "portrait", "standing", "sitting"),
    }
)


def shared_words(captions: Mapping[str, Sequence[str]], known: Iterable[str] = ()) -> list[tuple[str, float]]:
    """(word, share of the pictures whose captions hold it), most frequent first.

    Args:
        captions: of each picture.
        known: texts whose words are meant to be everywhere: the trigger, prefix and suffix.
    """
    if len(captions) < FEWEST:
        return []
    meant = COMMON | MEDIUM | {word for text in known for word in words_of(text)}
    counts = Counter(
        word for lines in captions.values() for word in {word for line in lines for word in words_of(line)} - meant
    )
    shares = [(word, count / len(captions)) for word, count in counts.items()]
    frequent = [pair for pair in shares if pair[1] > SHARE and any(map(str.isalpha, pair[0]))]
    return sorted(frequent, key=lambda pair: (-pair[1], pair[0]))


def identity_warning(captions: Mapping[str, Sequence[str]], trigger: str, known: Iterable[str] = ()) -> Problem | None:
    """What to say about words that most captions share beside the trigger; None when there are none."""
    words = shared_words(captions, (trigger, *known))
    if not words:
        return None
    listed = ", ".join(f"{word} {share:.0%}" for word, share in words[:SHOWN])
    return Problem(
        "",
        f"most of {len(captions)} captions share these words: {listed}",
        f"what belongs to the subject itself (hair, colour, breed) is then learned by them instead of {trigger!r}",
        f"leave such words out with --without {words[0][0]!r}, or keep those that you will write in every prompt",
        "warning",
    )
