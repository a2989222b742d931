"""The tools as functions of paths: read, do, write, verify; `finetune convert`, `merge`, `resize` and `extract`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.dtypes import DTYPES
from finetune.errors import check_choice
from finetune.interchange.adapter import Adapter
from finetune.interchange.choices import LARGEST_RANK, NUMBER_FORMATS, check_merge, check_output, check_rank
from finetune.interchange.conversion import DEFAULT_RANK, Conversion, check_spelling, write
from finetune.interchange.into_base import IntoBase, merge_into
from finetune.interchange.lowrank import RankRule, energy, fixed, frobenius, ratio
from finetune.interchange.merging import MERGES, Merged, Settings, Weighted, merge
from finetune.interchange.names import table_of
from finetune.interchange.reading import read_adapter
from finetune.interchange.resizing import Extraction, Resized, extract, resize
from finetune.tracking import Reporter
from finetune.weighted import parse_weighted

RULES = {"energy": energy, "frobenius": frobenius, "ratio": ratio}
"""Name -> rule that finds a rank per layer."""


def convert_adapter(
    source: Path,
    target: Path,
    *,
    to: str,
    dtype: str = "",
    base: Path | None = None,
    allow_lossy: bool = False,
    rank: int = DEFAULT_RANK,
    reporter: Reporter | None = None,
) -> Conversion:
    """An adapter of any make in another layout; see `conversion.write`.

    Args:
        source: a .safetensors file, a PEFT folder or a run's folder.

    Raises:
        ConfigError: for an unknown layout or number format, or a source that is no adapter.
        InterchangeError: if the layout cannot say what the adapter does; all reasons.
    """
    check_output(target, to, dtype, [source])
    adapter = read_adapter(source, base, whole=False)
    return write(adapter, target, to=to, dtype=dtype, base=base, allow_lossy=allow_lossy, rank=rank, reporter=reporter)


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
    check_output(output, to, dtype, [path for path, _ in named])
    weighted = [Weighted(path, weight, _read(path, base, to)) for path, weight in named]
    merged = merge(weighted, how, chosen, reporter or Reporter())
    merged.adapter.left_out = list(dict.fromkeys(word for one in weighted for word in one.adapter.left_out))
    return merged, write(merged.adapter, output, to=to, dtype=dtype, base=base)


def _read(path: Path, base: Path | None, to: str) -> Adapter:
    """An adapter that can be written in a layout afterwards; told before anything is computed."""
    adapter = read_adapter(path, base, whole=False)
    check_spelling(adapter, to)
    return adapter


def merge_into_base(
    adapters: Sequence[str],
    into: Path,
    output: Path,
    *,
    settings: Mapping[str, Any],
    dtype: str = "",
    force: bool = False,
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> IntoBase:
    """A base model with adapters in it; see `into_base.merge_into`.

    Args:
        dtype: "fp32", "fp16" or "bf16" for every weight of the result; empty keeps the base's own formats.
        base: pipeline folder that names the layers, for a single file of no published size.
    """
    how, chosen = _settings(settings)
    if dtype:
        check_choice(dtype, NUMBER_FORMATS, "number format (--dtype)")
    table = into if into.is_dir() else base
    weighted = [Weighted(path, weight, read_adapter(path, table)) for path, weight in map(parse_weighted, adapters)]
    names = None if into.is_dir() else table_of(base)
    written = DTYPES[dtype] if dtype else None
    return merge_into(
        weighted, into, output, how, chosen, reporter or Reporter(), force=force, names=names, dtype=written
    )


def resize_adapter(
    source: Path,
    target: Path,
    *,
    rank: int | None = None,
    shares: Mapping[str, float | None] | None = None,
    to: str = "kohya",
    dtype: str = "",
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Resized, Conversion]:
    """An adapter of another rank; see `resizing.resize`.

    Args:
        rank: for every layer; with one of `shares`, the largest.
        shares: name in RULES -> its number, or None; at most one number.
    """
    rule, largest = rank_rule(rank, shares or {})
    check_output(target, to, dtype, [source])
    resized = resize(_read(source, base, to), rule, largest, reporter or Reporter())
    return resized, write(resized.adapter, target, to=to, dtype=dtype, base=base)


def extract_adapter(  # noqa: PLR0913 - what the user chooses, one keyword each
    tuned: Path,
    original: Path,
    target: Path,
    *,
    rank: int = 64,
    shares: Mapping[str, float | None] | None = None,
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
    check_output(target, to, dtype, [tuned, original])
    wanted = Extraction(rule, largest, components, convolutions)
    extracted = extract(tuned, original, wanted, reporter or Reporter(), table_of(base))
    table = next((path for path in (original, tuned, base) if path and path.is_dir()), None)
    return extracted, write(extracted.adapter, target, to=to, dtype=dtype or "fp16", base=table)


def rank_rule(rank: int | None, shares: Mapping[str, float | None]) -> tuple[RankRule, int]:
    """(rule, largest rank) for what a user asked.

    Raises:
        ConfigError: see `check_rank`.
    """
    check_rank(rank, {name: shares.get(name) for name in RULES})
    rules = [RULES[name](value) for name, value in shares.items() if value is not None]
    return (rules[0] if rules else fixed(rank or LARGEST_RANK)), rank or LARGEST_RANK


def _settings(settings: Mapping[str, Any]) -> tuple[str, Settings]:
    fields = dict(settings)
    how = fields.pop("how", "concat")
    check_choice(how, MERGES, "way of merging (--how)")
    chosen = Settings(**fields)
    check_merge(chosen.rank, chosen.density)
    return how, chosen
