"""What the tools offer to choose from, and checks of a choice that need neither torch nor a file's content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from finetune.config.export import NumberFormat
from finetune.errors import ConfigError, check_choice

LAYOUTS = ("kohya", "diffusers", "peft", "ours")
"""Names in `writing.WRITERS`."""
MERGE_METHODS = ("concat", "svd", "linear", "ties", "dare")
"""Names in `merging.MERGES`."""
NUMBER_FORMATS: tuple[str, ...] = get_args(NumberFormat)
SHARES = ("energy", "frobenius", "ratio")
"""Names in `commands.RULES`. A test holds all of them against their tables."""
LARGEST_RANK = 4096


def check_rank(rank: int | None, shares: Mapping[str, float | None]) -> None:
    """Refuse a choice of rank that cannot be meant.

    Args:
        rank: for every layer; with a share, the largest. None is not given.
        shares: name in SHARES -> its number; None is not given.

    Raises:
        ConfigError: if nothing or too much is asked for, or a number makes no sense.
    """
    given = {name: value for name, value in shares.items() if value is not None}
    problems = []
    if len(given) > 1 or (not given and rank is None):
        asked = " and ".join(f"--{name}" for name in given) or "nothing"
        problems.append(f"give --rank, or one of {', '.join(f'--{name}' for name in shares)}; {asked} was given.")
    problems += _rank_problems(rank)
    for name, value in given.items():
        if name == "ratio" and not value > 1:
            problems.append(f"--ratio {value:g} is not a ratio above 1.")
        elif name != "ratio" and not 0 < value < 1:
            problems.append(f"--{name} {value:g} is not a share between 0 and 1.")
    if problems:
        raise ConfigError("The rank cannot be chosen this way:", problems)


def check_merge(rank: int | None, density: float) -> None:
    """Refuse numbers that no merge can use.

    Raises:
        ConfigError: with all of them.
    """
    problems = _rank_problems(rank)
    if not 0 < density <= 1:
        problems.append(f"--density {density:g} is not a share: it must be above 0 and at most 1.")
    if problems:
        raise ConfigError("The adapters cannot be merged this way:", problems)


def _rank_problems(rank: int | None) -> list[str]:
    wrong = rank is not None and not 1 <= rank <= LARGEST_RANK
    return [f"--rank {rank} is not between 1 and {LARGEST_RANK}."] if wrong else []


def check_output(target: Path, to: str, dtype: str, sources: Iterable[Path]) -> None:
    """Refuse an unknown layout or number format, and a new file that is a source or has no name for its layout.

    Args:
        dtype: empty for the source's own.

    Raises:
        ConfigError: saying which.
    """
    check_choice(to, LAYOUTS, "layout (--to)")
    if dtype:
        check_choice(dtype, NUMBER_FORMATS, "number format (--dtype)")
    if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
        raise ConfigError(f"{target} is one of the sources.", ["name another file for the result."])
    if to != "peft" and target.suffix != ".safetensors":
        raise ConfigError(f"{target} cannot hold this layout.", ["name a file that ends in .safetensors."])
