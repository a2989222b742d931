"""What is checked in pictures, by which limit, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from data_tools.dedupe import MAX_DISTANCE
from data_tools.errors import UsageError
from data_tools.records import Verdict
from data_tools.verdicts import WORDS


@dataclass(frozen=True)
class Rule:
    """One thing that is checked."""

    limit: float
    """The number that decides; its unit is told by `meaning`."""
    verdict: Verdict
    """What it leads to; keep turns the check off."""
    meaning: str
    """What is measured, and on which side of the limit it speaks."""
    above: bool = False
    """Whether numbers above the limit are what speaks; else those below."""


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "copy": Rule(0, "drop", "shows exactly the pixels of another picture; the first of them stays"),
        "near_copy": Rule(6, "review", "bits of 64 in which the looks differ from a better picture, at most this many"),
        "leak": Rule(6, "drop", "as near_copy, for a picture of the folder named by --against"),
        "small": Rule(256, "review", "shorter side in pixels, below this"),
        "aspect": Rule(3, "review", "longer side over shorter side, above this", above=True),
        "blur": Rule(60, "review", "sharpness (variance of the Laplacian, sharpest part at 512 px), below this"),
        "dark": Rule(50, "review", "grey level of the brightest 5 % of the pixels, below this: under-exposed"),
        "bright": Rule(200, "review", "grey level of the darkest 5 % of pixels, above it: over-exposed", above=True),
        "flat": Rule(12, "review", "grey levels between the darkest and brightest 5 %, below this: no contrast"),
        "bars": Rule(0.02, "review", "share of the picture in plain bars along its edges, above this", above=True),
    }
)
"""What is checked by default.

`blur` was set on photographs (docs/experiments.md): softened by 2 px at 512 px most measure 5 to 40, with their full
detail 65 to 8,000. The others are rules of thumb, to be changed with `change_rules`.
"""


def change_rules(
    limits: Mapping[str, float], verdicts: Mapping[str, str], rules: Mapping[str, Rule] = RULES
) -> dict[str, Rule]:
    """The rules with other limits and verdicts; all mistakes are named at once.

    Raises:
        UsageError: a check, verdict or limit that there is not.
    """
    wrong = [
        f"{name!r} is no check; there are {', '.join(rules)}" for name in {**limits, **verdicts} if name not in rules
    ]
    wrong += [
        f"{name}={verdict!r} is no verdict; there are {', '.join(WORDS)}"
        for name, verdict in verdicts.items()
        if verdict not in WORDS
    ]
    infinite = [name for name, number in limits.items() if not math.isfinite(number)]
    wrong += [f"{name}={limits[name]} is no limit; give a number" for name in infinite]
    wrong += [
        f"{name}={limits[name]:g} bits cannot be searched; give a whole number from 0 to {MAX_DISTANCE}"
        for name in ("near_copy", "leak")
        if name in limits and limits[name] not in range(MAX_DISTANCE + 1)
    ]
    if wrong:
        raise UsageError("These settings cannot be followed:", wrong)
    return {
        name: replace(rule, limit=limits.get(name, rule.limit), verdict=WORDS[verdicts.get(name, rule.verdict)])
        for name, rule in rules.items()
    }
