"""Which layers of a network are changed, and with what rank, strength and learning rate each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from data_tools.errors import counted
from finetune.adapters.methods import EVERYTHING, METHODS, Shape, storage_of
from finetune.adapters.starts import SUBTRACTED

SHOWN = 3
"""At most so many layers are named for one kind of problem."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets.

    Attributes:
        rank: width of its update.
        alpha: strength before it is divided by the rank.
        learning_rate: step size after warm-up.
    """

    rank: int
    alpha: float
    learning_rate: float


@dataclass(frozen=True)
class Block:
    """Layers that differ from the rest; None means as the rest, and an alpha of None keeps alpha / rank.

    Attributes:
        pattern: regular expression searched for in canonical layer names.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Wish:
    """What a run asks of one network.

    Attributes:
        section: the configuration section, for messages: "adapter".
        targets: what the user wrote there, for messages.
        pattern: regular expression that whole canonical layer names must match.
        method: name in METHODS.
        shape: size of the adapter.
        learning_rate: of layers without their own.
        conv: what is different in convolutions larger than 1x1.
        blocks: what is different elsewhere; the first that matches a layer counts, before `conv`.
    """

    section: str
    targets: str
    pattern: str
    method: str
    shape: Shape
    learning_rate: float
    conv: Block | None = None
    blocks: Sequence[Block] = ()


def plan_layers(
    wish: Wish, network: str, module: nn.Module, disk_name: Callable[[str], str]
) -> tuple[dict[str, LayerPlan], list[str]]:
    """(installed layer name -> its plan, everything that cannot be done in words).

    Args:
        network: what the network is called in messages.
        disk_name: from an installed to a canonical name.
    """
    problems = [
        f"{wish.section}.{field}={text!r} is no regular expression: {error}"
        for field, text in (("targets", wish.pattern), *(("blocks", block.pattern) for block in wish.blocks))
        if (error := _broken(text)) is not None
    ]
    problems += _contradictions(wish)
    if wish.targets == EVERYTHING and METHODS[wish.method].targets != EVERYTHING:
        problems.append(
            f"{wish.section}.targets={EVERYTHING} means every weight, norms too, which {wish.method} cannot change; "
            "use all, or method full"
        )
    if problems:
        return {}, problems
    names, problems = _targets(wish, network, module, disk_name)
    plans: dict[str, LayerPlan] = {}
    used: set[int] = set()
    for name in names:
        place = next((i for i, b in enumerate(wish.blocks) if re.search(b.pattern, disk_name(name))), None)
        if place is not None:
            used.add(place)
        block = wish.blocks[place] if place is not None else _conv(wish, module.get_submodule(name))
        plan = _plan(wish, block)
        if plan.rank:
            plans[name] = plan
    if names:
        problems += [
            f"{wish.section}.blocks: {block.pattern!r} is found in none of the {len(names)} targeted layers of "
            f"{network}; take it out or mend it"
            for i, block in enumerate(wish.blocks)
            if i not in used
        ]
        problems += _refused(wish, network, module, plans)
        if wish.conv is not None and not any(_is_large_conv(module.get_submodule(name)) for name in names):
            problems.append(
                f"{wish.section}.conv_rank or conv_alpha is set, but none of the {len(names)} targeted layers of "
                f"{network} is a convolution larger than 1x1; use targets=all, or leave them out"
            )
    return plans, problems


def _targets(
    wish: Wish, network: str, module: nn.Module, disk_name: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """Installed names of the layers that the pattern selects."""
    modules = dict(module.named_modules())
    whole = METHODS[wish.method].targets == EVERYTHING
    layers = [
        name for name, layer in modules.items()
        if (any(True for _ in layer.parameters(recurse=False)) if whole else isinstance(layer, nn.Linear | nn.Conv2d))
    ]  # fmt: skip
    field = f"{wish.section}.targets={wish.targets!r}"
    matched = [name for name in modules if name and re.fullmatch(wish.pattern, disk_name(name))]
    foreign = [name for name in matched if name not in set(layers)]
    if foreign and not whole:
        return [], [
            f"{field} also matches {foreign[0]}, which is a {type(modules[foreign[0]]).__name__} and no single layer; "
            r"end the pattern with the layers that are meant, e.g. \.(to_q|to_k|to_v)"
        ]
    matched = [name for name in matched if name in set(layers)]
    if not matched:
        examples = ", ".join(disk_name(name) for name in layers[:: max(1, len(layers) // 4)][:4])
        return [], [
            f"{field} matches none of the {len(layers)} layers of {network}; "
            f"the pattern must match a whole name such as {examples}"
        ]
    return matched, _without_convolution(wish, field, [modules[name] for name in matched], list(modules.values()))


def _without_convolution(wish: Wish, field: str, matched: list[nn.Module], every: list[nn.Module]) -> list[str]:
    """locon on a network with convolutions must reach one of them."""
    if wish.method != "locon" or any(map(_is_large_conv, matched)) or not any(map(_is_large_conv, every)):
        return []
    return [
        f"{field} holds no convolution, the one thing in which locon differs from lora; use targets=all, or method lora"
    ]


def _contradictions(wish: Wish) -> list[str]:
    """Settings that the method does not know."""
    method, shape, section = METHODS[wish.method], wish.shape, wish.section
    problems = []
    if not method.per_layer:
        differing = [f"blocks {b.pattern!r}" for b in wish.blocks if b.rank or b.alpha is not None]
        if wish.conv is not None:
            differing.append("conv_rank or conv_alpha")
        problems += [
            f"{section}: {wish.method} has one size for all layers, so {what} cannot set another rank or alpha; "
            "a block may set rank 0 or a learning_rate"
            for what in differing
        ]
    if shape.alpha != shape.rank and not method.per_layer:
        problems.append(f"{section}.alpha={shape.alpha:g} has no meaning for {wish.method}; leave it out")
    if shape.dropout and not method.dropout:
        problems.append(f"{section}.dropout={shape.dropout:g} has no meaning for {wish.method}; set it to 0")
    factors = tuple(name for name, entry in METHODS.items() if entry.factors)
    problems += [
        f"{section}.{field}={value} has no meaning for {wish.method}; it is for {', '.join(methods)}"
        for field, value, plain, methods in (
            ("init", shape.init, "default", factors),
            ("lora_plus_ratio", shape.lora_plus_ratio, 1.0, factors),
            ("lokr_factor", shape.factor, -1, ("lokr",)),
            ("tucker", shape.tucker, False, ("loha", "lokr")),
        )
        if value != plain and wish.method not in methods
    ]
    subtracted = shape.init in SUBTRACTED and method.factors
    if subtracted and wish.method == "dora":
        problems.append(
            f"{section}.init={shape.init} starts from the weights' directions and dora measures their lengths; "
            "PEFT defines no dora on top of it: use init=default, or method lora"
        )
    if subtracted and shape.dropout:
        problems.append(
            f"{section}.dropout={shape.dropout:g} would drop inputs of the factors but not of their start, which is "
            f"subtracted with init={shape.init}; set dropout=0"
        )
    ranks = {shape.rank, *(b.rank for b in (*wish.blocks, wish.conv) if b is not None and b.rank)}
    if shape.init == "orthogonal" and (odd := sorted(rank for rank in ranks if rank % 2)):
        problems.append(f"{section}.init=orthogonal needs even ranks, and there is {odd[0]}")
    return problems


def _conv(wish: Wish, layer: nn.Module) -> Block | None:
    return wish.conv if _is_large_conv(layer) else None


def _is_large_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _plan(wish: Wish, block: Block | None) -> LayerPlan:
    shape = wish.shape
    if block is None:
        return LayerPlan(shape.rank, shape.alpha, wish.learning_rate)
    rank = shape.rank if block.rank is None else block.rank
    alpha = shape.alpha / shape.rank * rank if block.alpha is None else block.alpha
    return LayerPlan(rank, alpha, block.learning_rate or wish.learning_rate)


def _refused(wish: Wish, network: str, module: nn.Module, plans: dict[str, LayerPlan]) -> list[str]:
    """Layers that the method cannot change, each with the reason; the first few are named."""
    reasons = [(name, why) for name in plans if (why := _refusal(wish, module.get_submodule(name), plans[name].rank))]
    lines = [f"{wish.section}.method={wish.method}: {network}.{name} {why}" for name, why in reasons[:SHOWN]]
    more = len(reasons) - SHOWN
    return lines + ([f"and so do {counted(more, 'more layer')} of {network}"] if more > 0 else [])


def _refusal(wish: Wish, layer: nn.Module, rank: int) -> str | None:
    method, held = METHODS[wish.method], storage_of(layer)
    if held not in method.storage:
        return (
            f"holds its weight otherwise ({held}), which {wish.method} cannot compute with; use lora, or "
            "model.storage=full"
        )
    if held == "packed" and wish.shape.init in SUBTRACTED:
        return f"holds its weight as packed numbers, which init={wish.shape.init} cannot start from; use init=default"
    weight: Any = layer.weight
    if wish.shape.init in SUBTRACTED and rank > (most := min(weight.flatten(1).shape)):
        return (
            f"has {most} directions, fewer than rank {rank}, so init={wish.shape.init} cannot start it; use a rank of "
            f"{most} or less there (blocks), or init=default"
        )
    return method.refuses(layer, wish.shape)


def _broken(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
