"""What is done to every caption, whoever said it: words exchanged or left out, prefix, suffix, trigger."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_tools.errors import RefusedError, UsageError
from data_tools.text import split_captions

SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?])")
EMPTY_PARTS = re.compile(r"(?:^[\s,;:]+)|(?:[\s,;:]+$)|(,)(?:\s*,)+")


@dataclass(frozen=True)
class Wording:
    """Changes to a caption, applied in the order of the fields. Words match whole and in any case of letters."""

    rewords: tuple[tuple[str, str], ...] = ()
    """(old, new) words or phrases."""
    without: tuple[str, ...] = ()
    """Words or phrases that are left out; the commas around them go too."""
    prefix: str = ""
    suffix: str = ""
    trigger: str | None = None
    """Stands first, followed by a comma, unless the caption holds it already."""

    def __post_init__(self) -> None:
        blank = [word for word in (*self.without, *(old for old, _ in self.rewords)) if not word.strip()]
        if blank or (self.trigger is not None and not self.trigger.strip()):
            raise UsageError("--trigger, --without and the left side of --reword are words; one of them is empty.")
        for text in (self.prefix, self.suffix, self.trigger or "", *(new for _, new in self.rewords)):
            try:
                lines = split_captions(text)
            except RefusedError as refusal:
                raise UsageError(f"{text!r} cannot stand in a caption: {refusal}.") from refusal
            if len(lines) > 1:
                raise UsageError(f"{text!r} holds a line break, which would make it two captions.")

    def __call__(self, caption: str) -> str:
        """The caption as it is to be written; an empty one stays empty but for what is added."""
        for old, new in self.rewords:
            caption = _whole(old).sub(lambda _, new=new: new, caption)  # type: ignore[misc]
        # keep: the longest first, or "red" would leave the hair of "red hair".
        for word in sorted(self.without, key=lambda phrase: len(" ".join(phrase.split())), reverse=True):
            caption = _whole(word).sub("", caption)
        if self.rewords or self.without:
            caption = _tidy(caption)
        caption = f"{self.prefix}{caption}{self.suffix}".strip()
        if self.trigger is not None and not _whole(self.trigger).search(caption):
            caption = f"{self.trigger}, {caption}" if caption else self.trigger
        return caption


def _whole(phrase: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def _tidy(caption: str) -> str:
    """One space between words, none before a mark, no comma without anything before or after it."""
    caption = SPACE_BEFORE_MARK.sub(r"\1", " ".join(caption.split()))
    return EMPTY_PARTS.sub(lambda found: found[1] or "", caption)
