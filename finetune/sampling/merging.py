"""Adapter files added into the live weights of a base, for runs that train on top of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.adapters import AdapterFile, merged_bias, merged_weight
from finetune.adapters.files import HEADER_KEY
from finetune.errors import CheckpointError, ConfigError
from finetune.families.base import Components, ModelFamily
from finetune.interchange import reading as interchange
from finetune.interchange.writing import to_file
from finetune.run_files import ADAPTER_FILE
from finetune.sampling.apply import adapter_targets
from finetune.sampling.papers import adapter_digest
from finetune.storage import safetensors_metadata
from finetune.weighted import parse_weighted


def read_adapter(path: Path, base: Path | None = None) -> AdapterFile:
    """An adapter to draw with, to go on from or to merge, of any layout that is read here.

    Args:
        path: a .safetensors file, a PEFT folder or a run folder.
        base: the base's pipeline folder, which names the layers of a base of no published size.

    Raises:
        UserError: if it is missing, damaged or of a layout that is not read here.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.", ["name a .safetensors file, a PEFT folder or a run folder."])
    file = path / ADAPTER_FILE if (path / ADAPTER_FILE).is_file() else path
    if file.is_file() and HEADER_KEY in safetensors_metadata(file):
        return AdapterFile.read(file)
    return to_file(interchange.read_adapter(file, base))


def merge_first(
    entries: Sequence[str], family: ModelFamily, components: Components, base: Path | None = None
) -> list[dict[str, Any]]:
    """Merge adapter files into the live base, one after the other, and make its digests say so.

    Args:
        entries: path or path@weight; the weight multiplies what the adapter changes, 1 if left out.
        base: the base's pipeline folder; see `read_adapter`.

    Returns:
        what was merged: name, SHA-256 and weight of each file.

    Raises:
        ConfigError: if an entry cannot be read as one.
        CheckpointError: if a file is damaged or does not fit the base.
    """
    merged = []
    for entry in entries:
        path, weight = parse_weighted(entry)
        file, digest = read_adapter(path, base), adapter_digest(path)
        if file.header.tokens:
            raise ConfigError(
                f"adapter.merge_first: {path.name} holds learned words ({', '.join(file.header.tokens)}), which no "
                "weight of the base can take in; learn them again with tokens."
            )
        for component in _merge(file, weight, family, components):
            key = "denoiser" if component == family.denoiser else component
            changed = f"{components.digests.get(key, '')} {digest} {weight!r}"
            components.digests[key] = hashlib.sha256(changed.encode()).hexdigest()
        components.digest = hashlib.sha256(f"{components.digest} {digest} {weight!r}".encode()).hexdigest()
        merged.append({"file": path.name, "sha256": digest, "weight": weight})
    return merged


@torch.no_grad()
def _merge(file: AdapterFile, strength: float, family: ModelFamily, components: Components) -> list[str]:
    """Change the live weights, computed in fp32 and rounded once; the components that were changed."""
    layers = adapter_targets(family, components, file)
    for (component, name), tensors in file.layers().items():
        layer: Any = layers[component, name]
        method, scale = file.header.method[component], file.scale(component, name)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        new = merged_weight(method, tensors, weight, scale, file.header.options)
        weight.copy_(weight.float() + strength * (new - weight.float()))
        new_bias = merged_bias(method, tensors, bias)
        if bias is not None and new_bias is not None:
            bias.copy_(bias.float() + strength * (new_bias - bias.float()))
    return file.components()
