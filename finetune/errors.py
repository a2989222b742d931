"""Errors that are the user's to mend: shown as text, never as a traceback.

Every problem says what was found and where, why it cannot work, and what to do about it. Problems are gathered and
raised together, so that one run of a command shows all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can mend; the command line prints it and exits with `exit_code`."""

    exit_code = 2

    def __init__(self, headline: str, problems: Iterable[str] = ()) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message: the headline, then one indented line per problem."""
        return "\n".join([self.headline, *(f"  - {problem}" for problem in self.problems)])

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback."""
        return self.text().splitlines()


class ConfigError(UserError):
    """The configuration or the command line asks for something that cannot be done."""


class DataError(UserError):
    """Pictures, captions or manifests that cannot be trained on as they are."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign, or belongs to another run."""

    exit_code = 4


class StorageError(UserError):
    """A disk that is full, missing or read-only."""

    exit_code = 5


class NumericError(UserError):
    """A loss, gradient or tensor that is not finite, or a parameter that cannot learn."""

    exit_code = 6


class BusyError(UserError):
    """Another process holds the output directory."""

    exit_code = 7


class UnsafeError(UserError):
    """Refused for safety: pickled weights, a path outside the named folders, remote code."""

    exit_code = 8


class ResourceError(UserError):
    """Not enough memory for what was asked."""

    exit_code = 9


class StoppedOnRequest(UserError):
    """A signal asked the run to stop; everything is saved and the same command goes on from there."""

    exit_code = 75


LISTED = 8
"""At most so many problems of one kind are listed."""


def first_few(problems: Iterable[str]) -> list[str]:
    """The first few problems, and how many more there are."""
    listed = list(problems)
    return [*listed[:LISTED], *([f"and {len(listed) - LISTED} more."] if len(listed) > LISTED else [])]


def check_choice(value: str, known: Iterable[str], what: str) -> None:
    """Refuse a name that is not among the known ones, with the nearest."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"The {what} {value!r} is not known{nearest(value, known)}; choose from {', '.join(known)}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean rank?)", or an empty string when nothing is near."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
