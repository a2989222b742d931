"""What is wrong with a file, in words for its owner; and the exceptions that carry such words.

A `Problem` names the file, what was found, why that cannot work and what to do. Problems are gathered over
the whole folder and shown together; `DataToolsError` is for the command line to print without a traceback.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
USAGE, DATA, STORAGE, UNSAFE = 2, 3, 5, 8
"""Exit codes by the kind of fault: a wrong option, a file to be mended, the disk's answer, refused for safety."""
SHOWN_NAMES = 12
"""How many names one line lists; a folder of 100,000 pictures can fail in one way 100,000 times."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding about one file (or about the folder itself, when `file_name` is empty).

    An "error" keeps the picture out of the records; a "warning" deserves a look; a "note" tells what
    was left aside.
    """

    file_name: str
    what: str
    why: str
    remedy: str
    severity: Severity = "error"
    code: int = DATA
    """The exit code that an error of this kind asks for."""

    def __str__(self) -> str:
        return sentence([self])


class RefusedError(Exception):
    """A file that cannot be used; whoever knows the file's name turns it into a `Problem`."""

    def __init__(self, what: str, why: str, remedy: str, code: int = DATA) -> None:
        self.what, self.why, self.remedy, self.code = what, why, remedy, code
        # keep: all of them, because an exception that comes from a worker process is made again from its arguments.
        super().__init__(what, why, remedy, code)

    def __str__(self) -> str:
        return f"{self.what}; {self.why}; {self.remedy}"

    def problem(self, file_name: str, severity: Severity = "error") -> Problem:
        """The same words about the file called `file_name`."""
        return Problem(file_name, self.what, self.why, self.remedy, severity, self.code)


class DataToolsError(Exception):
    """Pictures, captions or manifests that cannot be used as they are; commands exit with `exit_code`."""

    exit_code = DATA

    def __init__(self, headline: str, problems: Iterable[Problem | str] = (), exit_code: int | None = None) -> None:
        self.headline = headline
        self.problems = tuple(str(problem) for problem in problems)
        if exit_code is not None:
            self.exit_code = exit_code
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message: the headline, then one indented line per problem."""
        return "\n".join([self.headline, *(f"  - {problem}" for problem in self.problems)])

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback."""
        return self.text().splitlines()


class UsageError(DataToolsError):
    """An option or argument that cannot be followed."""

    exit_code = USAGE


class StorageError(DataToolsError):
    """A disk that is full, missing or read-only."""

    exit_code = STORAGE


def counted(number: int, thing: str, several: str = "") -> str:
    """ "1 picture", "1,200 pictures"; `several` where an s does not make the plural."""
    return f"{number:,} {thing if number == 1 else several or thing + 's'}"


def gravest(problems: Iterable[Problem]) -> int:
    """The exit code of several errors: unsafe before unreadable before to be mended; 0 without errors."""
    return max((problem.code for problem in problems if problem.severity == "error"), default=0)


def stop_for_errors(headline: str, problems: Iterable[Problem]) -> None:
    """Go on unless there is an error among the problems.

    Raises:
        DataToolsError: naming every error at once; its exit code is that of the gravest.
    """
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise DataToolsError(headline, grouped(errors), gravest(errors))


def shown(text: str) -> str:
    """`text` fit for a terminal: control, direction-changing and undecodable characters as escapes."""
    # U+200D joins emoji and changes nothing else.
    unsafe = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in unsafe and char != "\u200d"
        else char
        for char in text
    )


def sentence(problems: Sequence[Problem]) -> str:
    """One line for problems that share what, why and remedy: the names, then the three."""
    return ": ".join(filter(None, parts(problems)))


def parts(problems: Sequence[Problem]) -> tuple[str, str]:
    """Of problems that share what, why and remedy: the names, and the three."""
    first = problems[0]
    named = [problem.file_name for problem in problems if problem.file_name]
    names = ", ".join(shown(name) for name in named[:SHOWN_NAMES])
    if len(named) > SHOWN_NAMES:
        names += f" and {len(named) - SHOWN_NAMES:,} more"
    count = f" ({counted(len(problems), 'file')})" if len(problems) > 1 else ""
    words = "; ".join(shown(part) for part in (first.what, first.why, first.remedy))
    return names + count, f"{words}."


def grouped(problems: Iterable[Problem]) -> list[str]:
    """Every problem, those with the same words gathered into one line; order of first appearance."""
    return [sentence(group) for group in alike(problems)]


def alike(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Problems with the same words together; order of first appearance."""
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.what, problem.why, problem.remedy), []).append(problem)
    return list(groups.values())
