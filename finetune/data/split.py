"""Setting pictures aside by content: near copies never stand on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_tools.dedupe import Hashes, Looks, near_pairs, to_hashes
from data_tools.errors import Problem, counted
from finetune.data.dataset import Picture, shelf
from finetune.errors import ConfigError, DataError, first_few
from finetune.rng import seed_for

NEAR = 5
"""Bits of 64 in which the perceptual hashes of near copies differ at most: re-saved, resized or lightly edited."""


def split_holdout(
    pictures: Sequence[Picture], count: int, seed: int
) -> tuple[Sequence[Picture], Sequence[Picture], list[Problem]]:
    """Training pictures, held-out subject pictures, and what to say about them.

    Near copies stay together. Which groups are held out depends on the seed, the names and the contents only; a group
    that would exceed `count` is passed over.

    Raises:
        ConfigError: if nothing would be left to train on, or every group is larger than `count`.
    """
    number = sum(not p.is_class for p in pictures)
    if count >= number:
        raise ConfigError(
            f"validation.holdout={count} leaves nothing to train on: there "
            f"{counted(number, 'subject picture is', 'subject pictures are')} in all; "
            "set it to 0 (a probe of the training pictures is used) or add pictures."
        )
    if not count:
        return pictures, [], []
    subject = shelf(p for p in pictures if not p.is_class)
    first = groups(subject)
    sizes = np.bincount(first, minlength=len(first))
    # keep: each group has a place of its own, so that adding or removing a picture leaves the others where they are.
    places = np.array([seed_for(seed, "holdout", picture.key) for picture in subject], dtype=np.uint64)
    chosen: list[int] = []
    left = count
    for leader in np.argsort(places, kind="stable").tolist():
        if 0 < sizes[leader] <= left:
            chosen.append(leader)
            left -= int(sizes[leader])
    if not chosen:
        smallest = int(sizes[sizes > 0].min())
        raise ConfigError(
            f"validation.holdout={count} cannot be set aside: the pictures fall into groups of near copies, the "
            f"smallest with {smallest}, and copies of a held-out picture would be trained on; set it to {smallest} or "
            "more, remove copies, or name other pictures in validation.folder."
        )
    held = {subject[int(place)].key for place in np.flatnonzero(np.isin(first, chosen))}
    problems = []
    if len(held) < count:
        problems.append(
            Problem(
                "",
                f"{counted(len(held), 'picture is', 'pictures are')} held out instead of {count}",
                "the next group of near copies is larger, and copies stay together",
                "remove near copies, or accept it",
                "warning",
            )
        )
    training = shelf(p for p in pictures if p.key not in held)
    return training, shelf(p for p in pictures if p.key in held), problems


def overlap(training: Sequence[Picture], validation: Sequence[Picture]) -> list[Problem]:
    """A warning for every validation picture of which a near copy is trained on.

    Raises:
        DataError: if pictures are in both, the same to the pixel: what they say of overfitting would be a lie.
    """
    held = {picture.pixel_sha256: picture.path for picture in validation}
    same = [(held[p.pixel_sha256], p.path) for p in training if p.pixel_sha256 in held]
    if same:
        raise DataError(
            f"{counted(len(same), 'picture is', 'pictures are')} in validation.folder and trained on as well, so "
            "overfitting could not be seen:",
            [
                *first_few(f"{own.parent.name}/{own.name} shows the pixels of {theirs.name}" for own, theirs in same),
                "remove them from one of the folders (`finetune data clean PHOTOS --against VALIDATION --write` does "
                "it), or set validation.folder=null and validation.holdout to a number of pictures",
            ],
        )
    hashes, places = np.unique(_looks(training).straight, return_index=True)
    mine, theirs, _ = near_pairs(_looks(validation), _blind(hashes), NEAR)
    first: dict[int, int] = {}
    for i, j in zip(mine.tolist(), places[theirs].tolist(), strict=True):
        first[i] = min(j, first.get(i, j))
    return [
        Problem(
            f"{validation[i].path.parent.name}/{validation[i].path.name}",
            f"is in validation.folder, and {training[j].path.name} of the training pictures is nearly the same",
            "what is trained on hides overfitting",
            "remove one of the two",
            "warning",
        )
        for i, j in sorted(first.items())
    ]


def groups(pictures: Sequence[Picture]) -> NDArray[np.int64]:
    """Which pictures are near copies of each other, directly or through others.

    Returns:
        For each picture the place of the one of its group with the first key; of a single picture its own. Shape (n,).
    """
    hashes, same = np.unique(_looks(pictures).straight, return_inverse=True)
    leader: dict[int, int] = {}

    def find(i: int) -> int:
        while (other := leader.get(i, i)) != i:
            leader[i] = i = leader.get(other, other)
        return i

    looks = _blind(hashes)
    i, j, _ = near_pairs(looks, looks, NEAR)
    for a, b in zip(i[i < j].tolist(), j[i < j].tolist(), strict=True):
        leader[find(b)] = find(a)
    group = np.arange(len(hashes))
    for a in leader:
        group[a] = find(a)
    group = group[same]
    first = np.arange(len(group))
    copies = np.flatnonzero(np.bincount(group)[group] > 1).tolist()
    leaders: dict[int, int] = {}
    for place in sorted(copies, key=lambda place: pictures[place].key):
        first[place] = leaders.setdefault(int(group[place]), place)
    return first


def _looks(pictures: Sequence[Picture]) -> Looks:
    """Their hashes; colours are not told apart, for here a copy that is missed costs more than one too many."""
    return _blind(to_hashes(picture.phash for picture in pictures))


def _blind(hashes: Hashes) -> Looks:
    return Looks(hashes, hashes, np.zeros((len(hashes), 1, 1, 3), dtype=np.int16))
