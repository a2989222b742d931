"""What a captioner is asked and what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from data_tools.errors import Problem
from data_tools.folder import Listing
from data_tools.records import Role, Verdict


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
    focus: tuple[float, float] | None = None
    loss_weight: float = 1.0


@dataclass
class Answer:
    """Captions by file name, and what was met on the way."""

    captions: dict[str, Caption] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    """Pictures that have no caption and whose reason is among the problems."""
    used: set[str] = field(default_factory=set)
    """Caption files that were read, and masks that rows name."""

    def fail(self, name: str, problem: Problem) -> None:
        """The picture `name` gets no caption because of `problem`."""
        self.failed.add(name)
        self.problems.append(problem)

    def extend(self, other: Answer, names: Iterable[str]) -> None:
        """Take over what `other` says about the pictures `names`, and its problems."""
        self.captions.update({name: other.captions[name] for name in names if name in other.captions})
        self.problems.extend(other.problems)
        self.failed |= other.failed
        self.used |= other.used


class Captioner(Protocol):
    """Captions for all pictures of a folder at once, so that a model can work in batches.

    It answers for the pictures it knows and names a problem for those it tried and failed on; pictures it has
    nothing to say about are simply not in the answer. It writes nothing.
    """

    def __call__(self, listing: Listing, template: str | None) -> Answer:
        """Caption `listing.pictures`; `template` is the user's sentence with blanks, or None."""
        ...
