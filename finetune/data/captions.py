"""What a picture is called in one draw: its captions made into one text by rules, with every choice keyed.

In the order in which they are applied: `[trigger]` becomes the trigger word, `{red|blue}` one of its options, tags are
dropped and shuffled, prefix and suffix are put around. Class pictures keep their captions as they were written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from finetune.config import has_word
from finetune.rng import python_rng

PLACEHOLDER = "[trigger]"
"""Stands for the trigger word, so that the captions of a folder serve any word."""
WILDCARD = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
"""Options between braces, e.g. {red|blue}; the innermost are decided first. Braces without a bar are plain text."""


@dataclass(frozen=True)
class CaptionRules:
    """How a caption varies from draw to draw.

    Attributes:
        shuffle: put the tags into another order.
        separator: what stands between two tags.
        keep_tokens: how many tags at the beginning stay where they are.
        keep_separator: where it stands, it decides instead: what is before the first and after the second one stays.
        tag_dropout: probability that a tag is left out; a tag with the trigger word and those that stay never are.
        prefix: put before every caption.
        suffix: put behind every caption.
        trigger: the word that calls the subject.
        verbatim: keep captions to the letter, braces and bars included; nothing else here counts then.
    """

    shuffle: bool = False
    separator: str = ","
    keep_tokens: int = 0
    keep_separator: str = "|||"
    tag_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    trigger: str | None = None
    verbatim: bool = False


PLAIN = CaptionRules()
"""Changes nothing but placeholders, options and keep separators."""
VERBATIM = CaptionRules(verbatim=True)
"""Changes nothing: a class picture was rendered from these very words."""


def compose(caption: str, rules: CaptionRules, chance: Random) -> str:
    """One text from one caption as it was written; a pure function of both and of the draws."""
    if rules.verbatim:
        return caption
    text = _decide(caption.replace(PLACEHOLDER, rules.trigger or PLACEHOLDER), chance)
    head, tags, tail = _parts(text, rules)
    if rules.tag_dropout > 0:
        tags = [tag for tag in tags if chance.random() >= rules.tag_dropout or _has_trigger(tag, rules)]
    if rules.shuffle:
        chance.shuffle(tags)
    if (head, tags, tail) != _parts(text, rules) or rules.keep_separator in text:
        text = f"{rules.separator} ".join([*head, *tags, *tail])
    return " ".join(part for part in (rules.prefix, text, rules.suffix) if part)


def varies(captions: Sequence[str], rules: CaptionRules) -> bool:
    """Whether these captions give other texts in other draws, apart from being several."""
    if rules.verbatim:
        return False
    return rules.shuffle or rules.tag_dropout > 0 or any(WILDCARD.search(caption) for caption in captions)


def draw_caption(captions: Sequence[str], rules: CaptionRules, chance: Random, variants: int | None) -> str:
    """One of a picture's captions, composed.

    Args:
        captions: as they were written.
        rules: how they vary.
        chance: this draw's own choices.
        variants: how many texts each caption may become, or None for no bound.
    """
    caption = chance.choice(captions)
    if variants is None or not varies([caption], rules):
        return compose(caption, rules, chance)
    return _variant(caption, rules, chance.randrange(variants))


def every_caption(captions: Sequence[str], rules: CaptionRules, variants: int) -> list[str]:
    """Every text that `draw_caption` can give with this many variants, each once."""
    texts = [
        _variant(caption, rules, number)
        for caption in captions
        for number in range(variants if varies([caption], rules) else 1)
    ]
    return list(dict.fromkeys(texts))


def plain_caption(captions: Sequence[str], rules: CaptionRules) -> str:
    """The text that a picture is validated with: its first caption with every tag in its place."""
    return _variant(captions[0], replace(rules, shuffle=False, tag_dropout=0.0), 0)


def without_trigger(captions: Sequence[str], rules: CaptionRules, variants: int) -> list[str]:
    """The texts these captions can become that do not hold the trigger word."""
    return [text for text in every_caption(captions, rules, variants) if not _has_trigger(text, rules)]


def _variant(caption: str, rules: CaptionRules, number: int) -> str:
    # keep: without the run's seed, so that runs that share a cache share its texts.
    return compose(caption, rules, python_rng(0, "caption variant", caption, number))


def _decide(text: str, chance: Random) -> str:
    """Replace every `{a|b}` by one of its options."""
    while match := WILDCARD.search(text):
        option = chance.choice(match[1].split("|")).strip()
        text = text[: match.start()] + option + text[match.end() :]
    return text


def _parts(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, tags that move, tags that stay behind."""
    sections = [_tags(section, rules) for section in text.split(rules.keep_separator)]
    if len(sections) == 1:
        return sections[0][: rules.keep_tokens], sections[0][rules.keep_tokens :], []
    return sections[0], sections[1], [tag for section in sections[2:] for tag in section]


def _tags(text: str, rules: CaptionRules) -> list[str]:
    return [tag.strip() for tag in text.split(rules.separator) if tag.strip()]


def _has_trigger(text: str, rules: CaptionRules) -> bool:
    return bool(rules.trigger) and has_word(text, str(rules.trigger))
