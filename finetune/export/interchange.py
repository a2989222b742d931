"""A run's adapter as the neutral value that the layouts' writers take, named after the live base."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune.export.changes import Change, changes
from finetune.export.job import Job
from finetune.interchange.adapter import Adapter, Update
from finetune.interchange.conversion import approximated
from finetune.interchange.live import architecture_of
from finetune.interchange.names import Architecture
from finetune.interchange.original_names import Shape
from finetune.interchange.weights import Weights
from finetune.tracking import Reporter

BALANCED = {"lora", "locon", "rslora", "dora"}
"""Methods of two factors whose product alone counts."""
STRONG = ("hada_w1_a", "lokr_w2", "lokr_w2_a")
"""The factor that takes in the strength of a LoHa or LoKr."""


def architecture(job: Job) -> Architecture:
    """The names of the live base; how programs spell them follows the published model most like it."""
    return architecture_of(job.family, job.components)


def to_interchange(job: Job) -> Adapter:
    """The adapter with its strength folded into lora_B, so that alpha equals the rank in every layout.

    Readers disagree about alpha (diffusers ignores it without metadata and mixes up per-layer values in kohya layout);
    none can go wrong with a scale of one. Layers trained whole become changes of their weights.
    """
    updates = {
        place: _update(change, job.dtype) for place, change in changes(job).items()
    }
    return Adapter(updates, architecture(job), layout="ours")


def without_alpha(adapter: Adapter) -> Adapter:
    """The same adapter for kohya's readers: the strength of a LoHa or LoKr goes into a factor, so that alpha = rank.

    LyCORIS 3 multiplies it in twice when it merges such files, and all of them take two whole Kronecker factors for
    strength 1 whatever alpha says.
    """
    return adapter.with_updates({place: _folded(update) for place, update in adapter.updates.items()})


def as_lora(job: Job, adapter: Adapter, rank: int) -> tuple[Adapter, list[str]]:
    """A LoRA of `rank` in place of every layer that is none; and what that costs, in words."""
    known = changes(job)
    plain = {
        place: _difference(known[place]) if update.needs_base else update for place, update in adapter.updates.items()
    }
    wanted, _, notes = approximated(adapter.with_updates(plain), rank, Weights(), Reporter())
    return wanted, notes


def lost_share(job: Job, wanted: Adapter) -> float:
    """|what is written - what was trained| / |what was trained|, over all changed weights and biases."""
    lost = whole = 0.0
    for place, change in changes(job).items():
        for name, delta in change.deltas().items():
            whole += float(delta.square().sum())
            written = wanted.updates[place].delta().double() if place in wanted.updates and name == "weight" else None
            lost += float((delta if written is None else delta - written.reshape(delta.shape)).square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def _folded(update: Update) -> Update:
    part = next((part for part in STRONG if part in update.tensors), None)
    if part is None:
        return update
    return replace(update, scale=1.0, tensors={**update.tensors, part: update.tensors[part] * update.scale})


def _update(change: Change, dtype: torch.dtype) -> Update:
    tensors, scale = dict(change.tensors), change.scale
    if change.method in BALANCED:
        down, up = tensors["lora_A.weight"].double(), tensors["lora_B.weight"].double() * scale
        if dtype == torch.float16:
            down, up = _balanced(down, up)
        tensors |= {"lora_A.weight": down, "lora_B.weight": up}
        return Update("dora" if change.method == "dora" else "lora", _floats(tensors), 1.0, shape=_shape(change))
    if change.method == "full":
        return _difference(change)
    return Update(change.method, _floats(tensors), scale, change.options, _shape(change))


def _difference(change: Change) -> Update:
    names = {"weight": "diff", "bias": "diff_b"}
    return Update("diff", {names[name]: delta.float() for name, delta in change.deltas().items()}, shape=_shape(change))


def _shape(change: Change) -> Shape:
    layer: Any = change.layer
    return tuple(layer.weight.shape)


def _floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().float() for name, tensor in tensors.items()}


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of like size; a power of two moves over, which costs no accuracy.

    fp16 has few digits below 6e-5, where lora_B of a short run lives, and ends at 65504.
    """
    largest = float(down.abs().max()), float(up.abs().max())
    if not all(largest):
        return down, up
    shift = round((math.log2(largest[0]) - math.log2(largest[1])) / 2)
    return down * 2.0**-shift, up * 2.0**shift
