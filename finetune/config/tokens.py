"""Fields of textual inversion: words whose meaning is learned."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from finetune.config.section import Section


def bracketed(word: str) -> str:
    """A word that can be no ordinary one and no part of one."""
    if not re.fullmatch(r"<[a-z0-9][a-z0-9_-]*>", word):
        raise ValueError(
            "a learned word stands in angle brackets, in lower case letters, digits, - and _, such as <my-robot>: then "
            "it can be no ordinary word and no part of one"
        )
    return word


Word = Annotated[str, AfterValidator(bracketed)]
"""Such as "<my-robot>"."""


class TokensConfig(Section):
    """Words that are learned: alone (textual inversion) or beside an adapter (pivotal tuning)."""

    words: dict[Word, Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]] = Field(min_length=1)
    """Learned word -> ordinary words to start from, e.g. {"<my-robot>": "toy robot"}. Captions contain the word."""
    vectors: int | None = Field(default=None, ge=1, le=75)
    """Vectors per word; each takes one place of the prompt. None: as many as its starting words have tokens."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the vectors. None means optimizer.learning_rate; 1e-3 to 1e-2 is usual."""
    text_encoders: tuple[str, ...] | None = None
    """Text encoders that learn the words. None means all; the others read a word as plain characters."""
    train_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps after which the vectors stay as they are."""
    norm_pull: float = Field(default=0.0, ge=0, le=1)
    """After each step a vector v becomes v (m / |v|)^norm_pull, m the vocabulary's mean length. 0 is off."""
