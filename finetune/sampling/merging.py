"""Adapter files added into the live weights of a base, for runs that train on top of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters import AdapterFile, merged_bias, merged_weight
from finetune.errors import CheckpointError, ConfigError
from finetune.families.base import Components, ModelFamily
from finetune.families.text import installed_name
from finetune.storage import sha256_file

SHOWN = 8
"""At most so many misfits are listed."""


def read_adapter(path: Path) -> AdapterFile:
    """An adapter to go on from or to merge; the one place that decides which layouts are read.

    Raises:
        CheckpointError: if it is missing, damaged or of a layout that is not read here.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file.", ["name the adapter.safetensors of a run."])
    return AdapterFile.read(path)


def merge_first(entries: Sequence[str], family: ModelFamily, components: Components) -> list[dict[str, Any]]:
    """Merge adapter files into the live base, one after the other, and make its digests say so.

    Args:
        entries: path or path@weight; the weight multiplies what the adapter changes, 1 if left out.

    Returns:
        what was merged: name, SHA-256 and weight of each file.

    Raises:
        ConfigError: if an entry cannot be read as one.
        CheckpointError: if a file is damaged or does not fit the base.
    """
    merged = []
    for entry in entries:
        path, weight = parse_weighted(entry)
        file, digest = read_adapter(path), sha256_file(path)
        if file.header.tokens:
            raise ConfigError(
                f"adapter.merge_first: {path.name} holds learned words ({', '.join(file.header.tokens)}), which no "
                "weight of the base can take in; learn them again with tokens."
            )
        for component in _merge(file, weight, path.name, family, components):
            key = "denoiser" if component == family.denoiser else component
            changed = f"{components.digests.get(key, '')} {digest} {weight!r}"
            components.digests[key] = hashlib.sha256(changed.encode()).hexdigest()
        components.digest = hashlib.sha256(f"{components.digest} {digest} {weight!r}".encode()).hexdigest()
        merged.append({"file": path.name, "sha256": digest, "weight": weight})
    return merged


def parse_weighted(entry: str) -> tuple[Path, float]:
    """(path, weight) of "path" or "path@weight".

    Raises:
        ConfigError: if what follows the last @ is no number and there is no such file either.
    """
    head, at, tail = entry.rpartition("@")
    if not at or Path(entry).expanduser().exists():
        return Path(entry).expanduser(), 1.0
    try:
        return Path(head).expanduser(), float(tail)
    except ValueError:
        raise ConfigError(f"adapter.merge_first: {entry!r} is not path@weight; {tail!r} is no number.") from None


@torch.no_grad()
def _merge(file: AdapterFile, strength: float, label: str, family: ModelFamily, components: Components) -> list[str]:
    """Change the live weights, computed in fp32 and rounded once; the components that were changed."""
    layers = {place: _layer(place, family, components) for place in file.layers()}
    missing = [f"{'.'.join(place)}: the base has no such layer" for place, layer in layers.items() if layer is None]
    if missing:
        raise CheckpointError(
            f"{label} does not fit the base {components.source!r}, but was made on {file.header.base!r}:",
            missing[:SHOWN],
        )
    for (component, name), tensors in file.layers().items():
        layer: Any = layers[component, name]
        method, scale = file.header.method[component], file.scale(component, name)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        try:
            new = merged_weight(method, tensors, weight, scale, file.header.options)
        except RuntimeError as error:
            raise CheckpointError(f"{label} does not fit the base:", [f"{component}.{name}: {error}"]) from error
        weight.copy_(weight.float() + strength * (new - weight.float()))
        new_bias = merged_bias(method, tensors, bias)
        if bias is not None and new_bias is not None:
            bias.copy_(bias.float() + strength * (new_bias - bias.float()))
    return file.components()


def _layer(place: tuple[str, str], family: ModelFamily, components: Components) -> nn.Module | None:
    component, name = place
    network = components.denoiser if component == family.denoiser else components.text_encoders.get(component)
    if network is None:
        return None
    try:
        return network.get_submodule(installed_name(network, component, name))
    except AttributeError:
        return None
