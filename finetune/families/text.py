"""Canonical parameter names of text encoders: what stands on disk, whatever the installed transformers calls a module.

transformers 5.6 flattened CLIPTextModel (`encoder.layers...`), while every published checkpoint and every reader of
adapter files says `text_model.encoder.layers...`. Names gain the prefix on every write and lose it on every read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

PREFIX = "text_model."


def canonical(module: nn.Module, component: str, name: str) -> str:
    """The name on disk of the sub-module `name` of `module`.

    Args:
        module: the network that holds it, as installed.
        component: its pipeline name; only text encoders are renamed.
        name: dotted path as the installed library spells it.
    """
    if not _is_clip(module, component) or name.startswith(PREFIX):
        return name
    return PREFIX + name if name.startswith(("encoder.", "embeddings.", "final_layer_norm")) else name


def installed_name(module: nn.Module, component: str, canonical_name: str) -> str:
    """The inverse of `canonical` for the network at hand."""
    if _is_clip(module, component) and not hasattr(module, "text_model"):
        return canonical_name.removeprefix(PREFIX)
    return canonical_name


def spelled_out(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts in which every learned word of several vectors is followed by its further names: "<robot> <robot>_1".

    diffusers' pipelines with textual inversion do the same with the words their tokenizer knows.
    """
    known = tokenizer.added_tokens_encoder
    words = [word for word in known if f"{word}_1" in known]
    found = []
    for prompt in prompts:
        for word in words:
            count = next(number for number in itertools.count(1) if f"{word}_{number}" not in known)
            prompt = prompt.replace(word, " ".join([word, *(f"{word}_{i}" for i in range(1, count))]))  # noqa: PLW2901
        found.append(prompt)
    return found


def _is_clip(module: nn.Module, component: str) -> bool:
    model_type = getattr(getattr(module, "config", None), "model_type", "")
    return component.startswith("text_encoder") and str(model_type).startswith("clip")
