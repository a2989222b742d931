"""Captions into text files beside the pictures: batch by batch, so that a killed run goes on where it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_tools.captioners.base import Answer, Caption, Captioner
from data_tools.captioners.sidecar import sidecar
from data_tools.errors import Problem
from data_tools.files import storage_errors, write_atomic
from data_tools.folder import Listing
from data_tools.names import stem, suffix
from data_tools.processes import Share
from data_tools.wording import Wording

Progress = Callable[[int, int], None]
TEXT = (".txt", ".caption")


@dataclass
class Todo:
    """Which pictures are to be captioned, and into which files."""

    files: dict[str, str] = field(default_factory=dict)
    """Picture -> caption file."""
    kept: list[str] = field(default_factory=list)
    """Pictures whose caption file stays, readable or not."""
    problems: list[Problem] = field(default_factory=list)


def plan(listing: Listing, replace: bool, share: Share) -> Todo:
    """Look at what is there; a picture with a caption file keeps it unless `replace`.

    Each process takes every n-th picture of the folder, whatever others have written meanwhile.
    """
    todo = Todo()
    found = sidecar(listing, None)
    has = set(found.captions) | found.failed
    beside: dict[str, list[str]] = defaultdict(list)
    for name in listing.sidecars:
        # keep: a .json file without a caption belongs to a downloader, and a text file may stand beside it.
        if suffix(name) in TEXT:
            beside[stem(name)].append(name)
    first: dict[str, str] = {}
    for name in listing.pictures:
        first.setdefault(stem(name), name)
    for name in share.of(listing.pictures):
        files = beside[stem(name)]
        if name in has and not replace:
            todo.kept.append(name)
        elif first[stem(name)] != name:
            todo.problems.append(_same_stem(name, first[stem(name)]))
        elif len(files) > 1 or (name in has and not files):
            todo.problems.append(_elsewhere(name, files))
        else:
            todo.files[name] = files[0] if files else f"{name[: len(name) - len(suffix(name))]}.txt"
    return todo


def _same_stem(name: str, other: str) -> Problem:
    return Problem(
        name,
        f"shares its caption file with {other}",
        "the two have the same name but for the ending",
        "rename one of them",
    )


def _elsewhere(name: str, files: Sequence[str]) -> Problem:
    where = " and ".join(files) or "a .json file"
    return Problem(
        name,
        f"has its caption in {where}",
        "only a single .txt or .caption file is replaced",
        "remove what should not count",
    )


@dataclass
class Done:
    """What came of it; written or not."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def look(
    listing: Listing,
    todo: Todo,
    captioner: Captioner,
    wording: Wording,
    *,
    batch: int,
    write: bool,
    progress: Progress | None = None,
) -> Done:
    """Caption `todo.files` in batches; with `write` each batch is on disk before the next one is begun.

    Raises:
        StorageError: a caption file cannot be written; those before it are whole.
    """
    done = Done(problems=list(todo.problems))
    names = list(todo.files)
    for start in range(0, len(names), batch):
        part = Listing(listing.root, names[start : start + batch], listing.sidecars)
        answer = captioner(part, None)
        done.problems += answer.problems
        said = worded(answer, part.pictures, wording)
        done.captions |= said
        if write:
            save(listing, todo, said)
        if progress is not None:
            progress(start + len(part.pictures), len(names))
    return done


def worded(answer: Answer, names: Sequence[str], wording: Wording) -> dict[str, tuple[str, ...]]:
    """The captions of these pictures as they are to be written; equal ones once."""
    found: dict[str, Caption] = {name: answer.captions[name] for name in names if name in answer.captions}
    return {name: tuple(dict.fromkeys(map(wording, caption.captions))) for name, caption in found.items()}


def save(listing: Listing, todo: Todo, captions: dict[str, tuple[str, ...]]) -> None:
    """Write caption files, each beside its picture and whole or not at all.

    Raises:
        StorageError: the disk is full or does not allow it.
    """
    for name, lines in captions.items():
        path = listing.root / todo.files[name]
        with storage_errors(path):
            write_atomic(path, ("\n".join(lines) + "\n").encode())
