"""Setting pictures aside by content: near copies never stand on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data_tools.dedupe import Looks, near_pairs, to_hashes
from data_tools.errors import Problem, counted
from finetune.data.dataset import Picture
from finetune.errors import ConfigError
from finetune.rng import seed_for

NEAR = 5
"""Bits of 64 in which the perceptual hashes of near copies differ at most: re-saved, resized or lightly edited."""


def split_holdout(
    pictures: Sequence[Picture], count: int, seed: int
) -> tuple[list[Picture], list[Picture], list[Problem]]:
    """Training pictures, held-out subject pictures, and what to say about them.

    Near copies stay together. Which groups are held out depends on the seed, the names and the contents only; a group
    that would exceed `count` is passed over.

    Raises:
        ConfigError: if nothing would be left to train on, or every group is larger than `count`.
    """
    subject = [p for p in pictures if not p.is_class]
    if count >= len(subject):
        raise ConfigError(
            f"validation.holdout={count} leaves nothing to train on: there are {len(subject)} subject pictures; "
            "set it to 0 (a probe of the training pictures is used) or add pictures."
        )
    if not count:
        return list(pictures), [], []
    # keep: each group has a place of its own, so that adding or removing a picture leaves the others where they are.
    together = sorted(groups(subject), key=lambda group: seed_for(seed, "holdout", group[0].key))
    held: set[str] = set()
    for group in together:
        if len(held) + len(group) <= count:
            held.update(p.key for p in group)
    if not held:
        sizes = min(len(group) for group in together)
        raise ConfigError(
            f"validation.holdout={count} cannot be set aside: the pictures fall into groups of near copies, the "
            f"smallest with {sizes}, and copies of a held-out picture would be trained on; set it to {sizes} or more, "
            "remove copies, or name other pictures in validation.folder."
        )
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
    training = [p for p in pictures if p.key not in held]
    return training, [p for p in pictures if p.key in held], problems


def overlap(training: Sequence[Picture], validation: Sequence[Picture]) -> list[Problem]:
    """A warning for every validation picture of which a near copy is trained on."""
    mine, theirs, _ = near_pairs(_looks(validation), _looks(training), NEAR)
    first = dict(zip(reversed(mine.tolist()), reversed(theirs.tolist()), strict=True))
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


def groups(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Pictures that are near copies of each other, directly or through others; in the order of their keys."""
    ordered = sorted(pictures, key=lambda p: p.key)
    leader = list(range(len(ordered)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    looks = _looks(ordered)
    for i, j in zip(*(side.tolist() for side in near_pairs(looks, looks, NEAR)[:2]), strict=True):
        first, second = sorted((find(i), find(j)))
        leader[second] = first
    found: dict[int, list[Picture]] = defaultdict(list)
    for i, picture in enumerate(ordered):
        found[find(i)].append(picture)
    return list(found.values())


def _looks(pictures: Sequence[Picture]) -> Looks:
    """Their hashes; colours are not told apart, for here a copy that is missed costs more than one too many."""
    hashes = to_hashes([picture.phash for picture in pictures])
    return Looks(hashes, hashes, np.zeros((len(hashes), 1, 1, 3), dtype=np.int16))
