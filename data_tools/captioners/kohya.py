"""Folders as kohya's trainers name them: `10_sks dog/` holds pictures of "sks dog", 10 times an epoch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_tools.captioners.base import Answer, Caption
from data_tools.errors import Problem, RefusedError, counted
from data_tools.folder import Listing
from data_tools.text import split_captions

PATTERN = re.compile(r"(\d+)_(.*\S.*)", re.DOTALL)
MANY_REPEATS = 500


def kohya(listing: Listing, template: str | None) -> Answer:
    """Caption pictures in `N_name` folders (directly under the dataset folder) with the folder's name."""
    answer = Answer()
    for name in listing.pictures:
        found = parse(top_folder(name))
        if found is not None:
            try:
                answer.captions[name] = Caption((split_captions(found[1])[0],), "kohya folder")
            except RefusedError as refusal:
                answer.fail(name, refusal.problem(name))
    return answer


def parse(folder: str) -> tuple[int, str] | None:
    """ "10_sks dog" -> (10, "sks dog"); None for any other name and for 0 repeats."""
    match = PATTERN.fullmatch(folder)
    return (int(match[1]), match[2].strip()) if match and len(match[1]) < 7 and int(match[1]) > 0 else None


def top_folder(name: str) -> str:
    """The first folder of a relative name; empty for a picture at the top."""
    return name.split("/", 1)[0] if "/" in name else ""


def folder_name(folder: str) -> str:
    """The folder's name without kohya's number."""
    found = parse(folder)
    return found[1] if found else folder


def repeats(name: str) -> int:
    """How often the picture is seen per epoch by its folder's name; 1 outside of `N_name` folders."""
    found = parse(top_folder(name))
    return found[0] if found else 1


def folder_notes(listing: Listing) -> Iterator[Problem]:
    """Say how each folder was read, and which ones kohya's trainers would have skipped."""
    folders = {folder: parse(folder) for folder in sorted({top_folder(name) for name in listing.pictures})}
    for folder, found in folders.items():
        if found is not None:
            many = found[0] >= MANY_REPEATS
            yield Problem(
                f"{folder}/",
                f"is read as a kohya folder: {counted(found[0], 'repeat')} of {found[1]!r}",
                "its name is N_name" + (", though the number looks like a year or a count" if many else ""),
                "rename it if that is not meant",
                "warning" if many else "note",
            )
        elif any(folders.values()):
            yield Problem(
                f"{folder}/" if folder else "(the top folder)",
                "has no N_ in its name, beside folders that have",
                "kohya's trainers would skip it; here its pictures count once",
                "rename it to N_name, with N repeats",
                "warning",
            )
    if parse(listing.root.name) and not any(folders.values()):
        yield Problem(
            "",
            f"the folder given is itself named like a kohya folder ({listing.root.name})",
            "names are read one level down, as kohya's trainers do, so nothing is repeated",
            "give its parent folder if the repeats are wanted",
            "note",
        )
