"""Which of several processes this one is, as `accelerate launch` and torchrun tell it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_tools.errors import UsageError

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Share:
    """Process `rank` of `count`, counted from 0; rank 0 puts the shares together and speaks."""

    rank: int = 0
    count: int = 1

    def of(self, things: Sequence[Thing]) -> list[Thing]:
        """Every count-th thing, so that large pictures at the end of a list fall to all processes."""
        return list(things[self.rank :: self.count])


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
