"""Which of several processes this one is, as `accelerate launch` and torchrun tell it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from data_tools.errors import UsageError

PATIENCE = 60.0
"""Seconds without any news from the other processes, after which their share is done here."""
POLL = 0.2
"""Seconds between two looks at what the other processes have found."""


@dataclass(frozen=True)
class Share:
    """Process `rank` of `count`, counted from 0; rank 0 puts the shares together and speaks."""

    rank: int = 0
    count: int = 1

    def of(self, names: Iterable[str]) -> list[str]:
        """The names that are this process's. Each name is one process's, whatever others it stands among."""
        if self.count == 1:
            return list(names)
        return [name for name in names if _number(name) % self.count == self.rank]


ALONE = Share()


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def this_process(environment: Mapping[str, str] = os.environ) -> Share:
    """The share named by RANK and WORLD_SIZE; the whole where they are not set. No torch is needed.

    Raises:
        UsageError: the two are no rank and count.
    """
    rank, count = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise UsageError(
            f"RANK={rank!r} of WORLD_SIZE={count!r} is no process of a group; start several processes with "
            "`accelerate launch --num_processes N -m data_tools ...`, or unset both."
        )
    return Share(int(rank), int(count))


def wait_for_others(waiting: Iterable[str], there: Callable[[str], bool], refresh: Callable[[], int]) -> None:
    """Return when everything is there, or when the other processes have given no news for `PATIENCE`.

    Args:
        waiting: what the others were to find.
        there: whether something was found.
        refresh: reads what they have found since the last call; how much that was.
    """
    news = time.monotonic()
    left = list(waiting)
    while left and time.monotonic() - news < PATIENCE:
        if refresh():
            news = time.monotonic()
        left = [name for name in left if not there(name)]
        if left:
            time.sleep(POLL)
