"""Captions into text files beside the pictures: batch by batch, so that a killed run goes on where it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_tools.beside import Todo, plan_files
from data_tools.captioners.base import Answer, Caption, Captioner
from data_tools.captioners.sidecar import sidecar
from data_tools.errors import Problem
from data_tools.files import storage_errors, write_atomic
from data_tools.folder import Listing
from data_tools.inspection import Progress
from data_tools.names import stem, suffix, with_suffix
from data_tools.processes import Share
from data_tools.wording import Wording

TEXT = (".txt", ".caption")


def plan(listing: Listing, replace: bool, share: Share) -> Todo:
    """Look at what is there; a picture with a caption file, readable or not, keeps it unless `replace`."""
    found = sidecar(listing, None)
    has = set(found.captions) | found.failed
    beside: dict[str, list[str]] = defaultdict(list)
    for name in listing.sidecars:
        # keep: a .json file without a caption belongs to a downloader, and a text file may stand beside it.
        if suffix(name) in TEXT:
            beside[stem(name)].append(name)

    def place(name: str) -> str | Problem:
        files = beside[stem(name)]
        if len(files) > 1 or (name in has and not files):
            return _elsewhere(name, files)
        return files[0] if files else with_suffix(name, ".txt")

    return plan_files(listing.pictures, share, "caption file", () if replace else has, place)


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
