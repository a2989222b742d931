"""The tools as functions of paths: read, do, write, prove. What `finetune merge`, `resize` and `extract` call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.interchange.adapter import Adapter
from finetune.interchange.conversion import Conversion, check_choice, check_spelling, write
from finetune.interchange.into_base import IntoBase, merge_into
from finetune.interchange.lowrank import RankRule, energy, fixed, frobenius, ratio
from finetune.interchange.merging import MERGES, Merged, Settings, Weighted, merge
from finetune.interchange.names import table_of
from finetune.interchange.reading import read_adapter
from finetune.interchange.resizing import Extraction, Resized, extract, resize
from finetune.tracking import Reporter
from finetune.weighted import parse_weighted

LARGEST_RANK = 4096
RULES = {"energy": energy, "frobenius": frobenius, "ratio": ratio}
"""Name -> rule that finds a rank per layer."""


def merge_adapters(
    adapters: Sequence[str],
    output: Path,
    *,
    settings: Mapping[str, Any],
    to: str = "kohya",
    dtype: str = "",
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Merged, Conversion]:
    """One adapter file in place of several.

    Args:
        adapters: paths, each with @weight behind it or not.
        settings: "how" (name in MERGES) and the fields of `Settings`.

    Raises:
        ConfigError, InterchangeError: see `merging.merge` and `conversion.write`.
    """
    how, chosen = _settings(settings)
    named = [parse_weighted(text) for text in adapters]
    _check_output(output, [path for path, _ in named])
    weighted = [Weighted(path, weight, _read(path, base, to)) for path, weight in named]
    merged = merge(weighted, how, chosen, reporter or Reporter())
    return merged, write(merged.adapter, output, to=to, dtype=dtype, base=base)


def _read(path: Path, base: Path | None, to: str) -> Adapter:
    """An adapter that can be written in a layout afterwards; told before anything is computed."""
    adapter = read_adapter(path, base)
    check_spelling(adapter, to)
    return adapter


def merge_into_base(
    adapters: Sequence[str],
    into: Path,
    output: Path,
    *,
    settings: Mapping[str, Any],
    force: bool = False,
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> IntoBase:
    """A base model with adapters in it; see `into_base.merge_into`.

    Args:
        base: pipeline folder that names the layers, for a single file of no published size.
    """
    how, chosen = _settings(settings)
    table = into if into.is_dir() else base
    weighted = [Weighted(path, weight, read_adapter(path, table)) for path, weight in map(parse_weighted, adapters)]
    names = None if into.is_dir() else table_of(base)
    return merge_into(weighted, into, output, how, chosen, reporter or Reporter(), force=force, names=names)


def resize_adapter(
    source: Path,
    target: Path,
    *,
    rank: int = 0,
    shares: Mapping[str, float] | None = None,
    to: str = "kohya",
    dtype: str = "",
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Resized, Conversion]:
    """An adapter of another rank; see `resizing.resize`.

    Args:
        rank: for every layer; with one of `shares`, the largest.
        shares: name in RULES -> its number; at most one that is not zero.
    """
    rule, largest = rank_rule(rank, shares or {})
    _check_output(target, [source])
    resized = resize(_read(source, base, to), rule, largest, reporter or Reporter())
    return resized, write(resized.adapter, target, to=to, dtype=dtype, base=base)


def extract_adapter(  # noqa: PLR0913 - what the user chooses, one keyword each
    tuned: Path,
    original: Path,
    target: Path,
    *,
    rank: int = 64,
    shares: Mapping[str, float] | None = None,
    components: tuple[str, ...] = (),
    convolutions: bool = True,
    to: str = "kohya",
    dtype: str = "",
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Resized, Conversion]:
    """An adapter out of the difference of two models; see `resizing.extract`.

    Args:
        base: pipeline folder that names the layers, for two single files of no published size.
    """
    rule, largest = rank_rule(rank, shares or {})
    wanted = Extraction(rule, largest, components, convolutions)
    extracted = extract(tuned, original, wanted, reporter or Reporter(), table_of(base))
    table = next((path for path in (original, tuned, base) if path and path.is_dir()), None)
    return extracted, write(extracted.adapter, target, to=to, dtype=dtype or "fp16", base=table)


def rank_rule(rank: int, shares: Mapping[str, float]) -> tuple[RankRule, int]:
    """(rule, largest rank) for what a user asked.

    Raises:
        ConfigError: if nothing or too much is asked for, or a number makes no sense.
    """
    given = {name: value for name, value in shares.items() if value}
    problems = []
    if len(given) > 1 or (not given and not rank):
        asked = ", ".join(f"--{name}" for name in given) or "nothing"
        problems.append(f"give --rank, or one of {', '.join(f'--{name}' for name in RULES)}; {asked} was given.")
    if not 0 <= rank <= LARGEST_RANK:
        problems.append(f"--rank {rank} is not between 1 and {LARGEST_RANK}.")
    for name, value in given.items():
        sensible = value > 1 if name == "ratio" else 0 < value < 1
        if not sensible:
            problems.append(
                f"--{name} {value:g} is no {'ratio above 1' if name == 'ratio' else 'share between 0 and 1'}."
            )
    if problems:
        raise ConfigError("The rank cannot be chosen like this:", problems)
    rule = next((RULES[name](value) for name, value in given.items()), fixed(rank))
    return rule, rank or LARGEST_RANK


def _settings(settings: Mapping[str, Any]) -> tuple[str, Settings]:
    fields = dict(settings)
    how = fields.pop("how", "concat")
    check_choice(how, MERGES, "way of merging (--how)")
    chosen = Settings(**fields)
    problems = []
    if not 0 < chosen.density <= 1:
        problems.append(f"--density {chosen.density:g} is no share: it must be above 0 and at most 1.")
    if not 0 <= chosen.rank <= LARGEST_RANK:
        problems.append(f"--rank {chosen.rank} is not between 0 and {LARGEST_RANK}.")
    if problems:
        raise ConfigError("The adapters cannot be merged like this:", problems)
    return how, chosen


def _check_output(target: Path, sources: Sequence[Path]) -> None:
    if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
        raise ConfigError(f"{target} is one of the sources.", ["name another file for the result."])
