"""What a captioner is asked and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from data_tools.errors import Problem
from data_tools.folder import Listing
from data_tools.records import FOCUS, Focus, Role, Verdict
from data_tools.shelves import NamedShelf, packing


@dataclass(frozen=True, slots=True)
class Caption:
    """What one picture is called, where that was found, and what else was said there; None: nothing."""

    captions: tuple[str, ...]
    source: str
    role: Role | None = None
    repeats: int | None = None
    mask_file: str | None = None
    sha256: str | None = None
    verdict: Verdict = "keep"
    verdict_reasons: tuple[str, ...] = ()
    focus: Focus | None = None
    loss_weight: float = 1.0


CAPTION = packing(Caption, focus=FOCUS)


def _captions() -> NamedShelf[Caption]:
    return NamedShelf(*CAPTION)


@dataclass
class Answer:
    """Captions by file name, and what was met on the way."""

    captions: NamedShelf[Caption] = field(default_factory=_captions)
    problems: list[Problem] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    """Pictures that have no caption and whose reason is among the problems."""
    masks: set[str] = field(default_factory=set)
    """Pictures that are masks of others."""
    orphans: list[str] | None = None
    """Caption files without a picture; None where caption files were not asked for."""

    def missing(self, names: Iterable[str]) -> Iterator[str]:
        """Those of which nothing was said yet."""
        return (
            name
            for name, caption in self.captions.gather(names)
            if caption is None and name not in self.failed and name not in self.masks
        )

    def fail(self, name: str, problem: Problem) -> None:
        """The picture `name` gets no caption because of `problem`."""
        self.failed.add(name)
        self.problems.append(problem)

    def extend(self, other: Answer, names: Iterable[str]) -> None:
        """Take over what `other` says about the pictures `names`, and its problems."""
        for name, caption in other.captions.gather(names):
            if caption is not None:
                self.captions[name] = caption
        self.problems.extend(other.problems)
        self.failed |= other.failed


class Captioner(Protocol):
    """Captions for all pictures of a folder at once, so that a model can work in batches.

    It answers for the pictures it knows and names a problem for those it tried and failed on; pictures it has
    nothing to say about are simply not in the answer. It writes nothing.
    """

    def __call__(self, listing: Listing, template: str | None) -> Answer:
        """Caption `listing.pictures`; `template` is the user's sentence with blanks, or None."""
        ...
