"""Files that belong to pictures by their names, such as captions and masks: who gets one, and who keeps theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from data_tools.errors import Problem
from data_tools.names import stem
from data_tools.processes import Share


@dataclass
class Todo:
    """Which pictures get a file, and what it is called."""

    files: dict[str, str] = field(default_factory=dict)
    """Picture -> file."""
    kept: list[str] = field(default_factory=list)
    """Pictures whose file stays."""
    problems: list[Problem] = field(default_factory=list)

    def first(self, count: int) -> Todo:
        """The same for a few pictures, to be looked at."""
        return Todo(dict(list(self.files.items())[:count]), self.kept, self.problems)


def plan_files(
    pictures: Sequence[str], share: Share, what: str, kept: Collection[str], place: Callable[[str], str | Problem]
) -> Todo:
    """What is to be done for the pictures of this process; of two pictures of one stem the first has the file.

    Args:
        pictures: all of the folder.
        share: each process takes its own pictures, whatever others have written meanwhile.
        what: is written, such as "mask".
        kept: pictures that keep theirs.
        place: where the file of a picture is to stand, or why it can stand nowhere.
    """
    todo = Todo()
    first: dict[str, str] = {}
    for name in pictures:
        first.setdefault(stem(name), name)
    for name in share.of(pictures):
        other = first[stem(name)]
        if name in kept:
            todo.kept.append(name)
        elif isinstance(found := place(name) if other == name else _shared(name, what, other), Problem):
            todo.problems.append(found)
        else:
            todo.files[name] = found
    return todo


def _shared(name: str, what: str, other: str) -> Problem:
    same = "the two have the same name but for the ending"
    return Problem(name, f"shares its {what} with {other}", same, "rename one of them")
