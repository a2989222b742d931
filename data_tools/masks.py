"""Masks found by their names: `masks/cat.png` or `cat-masklabel.png` says where the loss of `cat.jpg` counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data_tools.errors import Problem, counted
from data_tools.names import stem

FOLDER = "masks"
SUFFIX = "-masklabel"
"""OneTrainer's ending."""


@dataclass
class Masks:
    """Which picture has which mask."""

    of: dict[str, str] = field(default_factory=dict)
    """Picture -> mask, both relative to the dataset folder."""
    problems: list[Problem] = field(default_factory=list)
    orphans: set[str] = field(default_factory=set)
    """Files in the folder of masks that are no picture's mask."""

    def files(self) -> set[str]:
        """All files that are no pictures to train on."""
        return {*self.of.values(), *self.orphans}


def find_masks(pictures: Sequence[str]) -> Masks:
    """Pair pictures and masks by name; a folder `masks` in which nothing fits a picture is a folder of pictures.

    The folder mirrors the dataset (`masks/sub/cat.png` belongs to `sub/cat.jpg`). A row of the metadata that
    names a mask wins over both ways.
    """
    candidates = {name: key for name in pictures if (key := _target(name)) is not None}
    found = Masks()
    if not candidates:
        return found
    by_stem: dict[str, list[str]] = {}
    for name in pictures:
        if name not in candidates:
            by_stem.setdefault(stem(name), []).append(name)
    for mask, key in candidates.items():
        for picture in by_stem.get(key, ()):
            other = found.of.setdefault(picture, mask)
            if other != mask:
                found.orphans.add(mask)
                found.problems.append(
                    Problem(
                        picture,
                        f"has two masks: {other} and {mask}",
                        "nothing says which one counts",
                        "remove one of them, or name one in the metadata",
                    )
                )
    if any(mask.startswith(f"{FOLDER}/") for mask in found.of.values()):
        found.problems += _orphans(candidates, found)
    if found.of:
        those = counted(len(found.of), "picture has", "pictures have")
        found.problems.append(
            Problem(
                "",
                f"{those} a mask by its name ({FOLDER}/NAME or NAME{SUFFIX})",
                "a mask says where the loss counts and is not trained on itself",
                "rename the masks if they are pictures",
                "note",
            )
        )
    return found


def _target(name: str) -> str | None:
    """The stem of the picture that `name` would be the mask of."""
    bare = stem(name)
    if bare.endswith(SUFFIX):
        return bare.removesuffix(SUFFIX)
    return bare.removeprefix(f"{FOLDER}/") if bare.startswith(f"{FOLDER}/") else None


def _orphans(candidates: dict[str, str], found: Masks) -> Iterator[Problem]:
    used = set(found.of.values()) | found.orphans
    for mask in candidates:
        if mask not in used and mask.startswith(f"{FOLDER}/"):
            found.orphans.add(mask)
            yield Problem(
                mask,
                "is the mask of no picture",
                f"the other files of {FOLDER}/ are masks, and no picture has this name",
                "rename it as its picture, or move it out of that folder",
            )
