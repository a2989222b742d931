"""Several adapters as one: what "adding two LoRAs" can mean, each meaning a function in a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.interchange.adapter import Adapter, InterchangeError, Place, Update
from finetune.interchange.lossy import LOSSES, NOTABLE, Meter, noted
from finetune.interchange.lowrank import distance, factors_of, of_dense, of_factors
from finetune.interchange.output import kept_metadata
from finetune.interchange.reading import shortened
from finetune.rng import rng
from finetune.tracking import Reporter


@dataclass(frozen=True)
class Part:
    """One adapter's share of a layer."""

    update: Update
    weight: float


@dataclass(frozen=True)
class Settings:
    """How to merge.

    Attributes:
        rank: of the result; None means the largest rank of the parts.
        density: share of values that "ties" and "dare" keep, in (0, 1].
        seed: of the values that "dare" drops.
    """

    rank: int | None = None
    density: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Weighted:
    """An adapter and how much of it is wanted."""

    path: Path
    weight: float
    adapter: Adapter


Merge = Callable[[Sequence[Part], Settings, Place], Update]


def concat(parts: Sequence[Part], settings: Settings, place: Place) -> Update:
    """sum_i w_i s_i B_i A_i, exactly, by putting the factors beside each other; the rank is the sum of the ranks."""
    up, down = stacked(parts)
    ones = [1] * (parts[0].update.tensors["lora_A.weight"].ndim - 2)
    tensors = {
        "lora_A.weight": down.float().reshape(-1, *parts[0].update.tensors["lora_A.weight"].shape[1:]),
        "lora_B.weight": up.float().reshape(*up.shape, *ones),
    }
    return Update("lora", tensors)


def linear(parts: Sequence[Part], settings: Settings, place: Place) -> Update:
    """(sum_i w_i B_i)(sum_i w_i s_i A_i) / sum_i w_i: adds factors, not changes.

    Right for checkpoints of one run, whose factors mean the same; for strangers it adds products of one's A with the
    other's B. How far it is from the true sum is reported.
    """
    shapes = {part.update.tensors["lora_A.weight"].shape for part in parts}
    total = sum(part.weight for part in parts)
    if len(shapes) > 1 or total == 0:
        reason = "has several ranks" if total else "has weights that sum to zero"
        raise InterchangeError("The adapters cannot be merged by linear.", [f"{'.'.join(place)} {reason}; use svd."])
    downs = [part.weight * part.update.scale * part.update.tensors["lora_A.weight"] for part in parts]
    ups = [part.weight * part.update.tensors["lora_B.weight"] for part in parts]
    return Update(
        "lora", {"lora_A.weight": torch.stack(downs).sum(0) / total, "lora_B.weight": torch.stack(ups).sum(0)}
    )


def svd(parts: Sequence[Part], settings: Settings, place: Place) -> Update:
    """The best approximation of the exact sum at a rank."""
    if _low_rank(parts):
        return of_factors(stacked(parts), _shape(parts)).update(_rank(parts, settings))
    return _at_rank(dense_sum(parts), parts, settings, place)


def ties(parts: Sequence[Part], settings: Settings, place: Place) -> Update:
    """Trim, elect signs, and average what agrees; see `dense_ties`."""
    return _at_rank(dense_ties(parts, settings, place), parts, settings, place)


def dare(parts: Sequence[Part], settings: Settings, place: Place) -> Update:
    """Drop values at random, rescale the rest, and add; see `dense_dare`."""
    return _at_rank(dense_dare(parts, settings, place), parts, settings, place)


MERGES: dict[str, Merge] = {"concat": concat, "svd": svd, "linear": linear, "ties": ties, "dare": dare}
"""What `finetune merge --how` offers."""


def dense_sum(parts: Sequence[Part], settings: Settings | None = None, place: Place = ("", "")) -> Tensor:
    """sum_i w_i Delta_i."""
    return torch.stack([part.weight * part.update.delta() for part in parts]).sum(dim=0)


def dense_ties(parts: Sequence[Part], settings: Settings, place: Place) -> Tensor:
    """Of each change only the largest values stay; per weight, those of the sign with more mass are averaged.

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3.
    """
    changes = []
    for part in parts:
        change = part.weight * part.update.delta()
        keep = max(1, round(settings.density * change.numel()))
        limit = change.abs().flatten().kthvalue(change.numel() - keep + 1).values
        changes.append(torch.where(change.abs() >= limit, change, 0.0))
    trimmed = torch.stack(changes)
    elected = trimmed.sum(dim=0).sign()
    agreeing = torch.where((trimmed.sign() == elected) & (trimmed != 0), trimmed, 0.0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp_min(1)


def dense_dare(parts: Sequence[Part], settings: Settings, place: Place) -> Tensor:
    """Each value of a change stays with a probability and is divided by it, so that the expected sum is right.

    Source: Yu et al. 2023, Language Models are Super Mario, arXiv:2311.03099, section 3.
    """
    total: Tensor | None = None
    for number, part in enumerate(parts):
        change = part.weight * part.update.delta()
        draw = torch.rand(change.shape, generator=rng(settings.seed, "dare", *place, number))
        kept = torch.where(draw < settings.density, change / settings.density, 0.0)
        total = kept if total is None else total + kept
    assert total is not None, "a merge has parts"
    return total


DENSE: dict[str, Callable[[Sequence[Part], Settings, Place], Tensor]] = {
    "concat": dense_sum,
    "svd": dense_sum,
    "ties": dense_ties,
    "dare": dense_dare,
}
"""The same as whole changes of weights, for merging into a base, where no rank limits them."""


@dataclass(frozen=True)
class Merged:
    """An adapter made of several.

    Attributes:
        distance: |merged - exact weighted sum| / |exact sum| over all layers.
    """

    adapter: Adapter
    distance: float


def merge(adapters: Sequence[Weighted], how: str, settings: Settings, reporter: Reporter) -> Merged:
    """One adapter in place of several.

    Raises:
        ConfigError: if they are for several kinds of base, or hold learned words of the same name.
        InterchangeError: for updates that only a base can tell, or that this way of merging cannot take.
    """
    check_same_base(adapters)
    places = sorted({place for item in adapters for place in item.adapter.updates})
    problems = _not_mergeable(adapters, how)
    if problems:
        raise InterchangeError(f"These adapters cannot be merged by {how}.", shortened(problems))
    result: dict[Place, Update] = {}
    meter = Meter()
    with reporter.progress("Merging", len(places)) as advance:
        for number, place in enumerate(places):
            parts = [
                Part(item.adapter.updates[place], item.weight) for item in adapters if place in item.adapter.updates
            ]
            result[place] = MERGES[how](parts, settings, place)
            if not _low_rank(parts):
                exact = Update("diff", {"diff": dense_sum(parts)})
            else:
                exact = result[place] if MERGES[how] is concat else concat(parts, settings, place)
            meter.add(place, *distance(exact, result[place]))
            advance(number + 1, "")
    merged = adapters[0].adapter.with_updates(result)
    merged.tokens = _tokens(adapters)
    merged.metadata = _metadata(adapters, how)
    merged.dtype = max((item.adapter.dtype for item in adapters), key=lambda dtype: dtype.itemsize)
    loss = meter.loss(f"merged by {how}, against the exact sum")
    if loss.total > NOTABLE:
        merged.metadata[LOSSES] = noted(merged.metadata.get(LOSSES, ""), [loss])
    return Merged(merged, loss.total)


def check_same_base(adapters: Sequence[Weighted]) -> None:
    """Raise a ConfigError unless all adapters are for one kind of base."""
    kinds = {item.adapter.architecture.name: item for item in adapters}
    if len(kinds) > 1:
        raise ConfigError(
            "Adapters for different base models cannot be merged.",
            [f"{item.path} is for {item.adapter.architecture.title}." for item in kinds.values()],
        )


def stacked(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """(up, down) of the exact weighted sum, fp64 matrices."""
    pairs = [factors_of(part.update) for part in parts]
    ups = [part.weight * up for part, (up, _) in zip(parts, pairs, strict=True)]
    return torch.cat(ups, dim=1), torch.cat([down for _, down in pairs])


def _not_mergeable(adapters: Sequence[Weighted], how: str) -> list[str]:
    problems = []
    for item in adapters:
        for (component, module), update in item.adapter.updates.items():
            name = f"{item.path.name}: {component}.{module} is {update.method}"
            if update.needs_base:
                problems.append(f"{name}, which depends on the base model's weights: merge into the base with --into.")
            elif not update.is_low_rank and how in ("concat", "linear"):
                problems.append(f"{name}: merge with svd, ties or dare, or convert it first with --allow-lossy.")
            elif "diff_b" in update.tensors or (update.method == "diff" and update.tensors["diff"].ndim < 2):
                problems.append(f"{name} of a bias or a norm, which a LoRA cannot express: merge with --into.")
    return problems


def _tokens(adapters: Sequence[Weighted]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for item in adapters:
        for word, vectors in item.adapter.tokens.items():
            if word in found:
                raise ConfigError(f"Two adapters have learned the word {word!r}.", ["leave one of them out."])
            found[word] = vectors
    return found


BASE_ENTRIES = ("finetune.base", "finetune.base_digest", "ss_sd_model_name")
"""What a file says of the base it is for."""


def _metadata(adapters: Sequence[Weighted], how: str) -> dict[str, str]:
    """Nobody's training facts, but everybody's trigger words and losses, and the base if all name the same; names of
    files, no folders.
    """
    triggers = dict.fromkeys(
        word.strip()
        for item in adapters
        for word in item.adapter.metadata.get("modelspec.trigger_phrase", "").split(",")
        if word.strip()
    )
    named = ", ".join(f"{item.path.name}@{item.weight:g}" for item in adapters)
    told = [(item.path.name, item.adapter.metadata[LOSSES]) for item in adapters if LOSSES in item.adapter.metadata]
    losses = [note for name, earlier in told for note in json.loads(noted(earlier, [], of=name))]
    stated = [kept_metadata(item.adapter) for item in adapters]
    agreed = {key: stated[0].get(key, "") for key in BASE_ENTRIES if len({one.get(key) for one in stated}) == 1}
    entries = agreed | {
        LOSSES: json.dumps(losses, ensure_ascii=False) if losses else "",
        "modelspec.merged_from": named,
        "finetune.merged_by": how,
        "modelspec.trigger_phrase": ", ".join(triggers),
    }
    return {key: value for key, value in entries.items() if value}


def _low_rank(parts: Sequence[Part]) -> bool:
    return all(part.update.is_low_rank for part in parts)


def _shape(parts: Sequence[Part]) -> tuple[int, ...]:
    tensors = parts[0].update.tensors
    return (tensors["lora_B.weight"].shape[0], *tensors["lora_A.weight"].shape[1:])


def _rank(parts: Sequence[Part], settings: Settings) -> int:
    return settings.rank or max(part.update.rank or 1 for part in parts)


def _at_rank(change: Tensor, parts: Sequence[Part], settings: Settings, place: Place) -> Update:
    rank = _rank(parts, settings)
    return of_dense(change, rank, *place).update(rank)
