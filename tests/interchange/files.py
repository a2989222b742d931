"""Adapter files of every make, as their trainers write them, with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.interchange.names import Architecture, published


def table(name: str) -> Architecture:
    return next(architecture for architecture in published() if architecture.name == name)


def noise(*shape: int, key: int = 0, size: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key + sum(shape))) * size


def lora(shape: tuple[int, ...], rank: int = 2, key: int = 0) -> dict[str, Tensor]:
    """Factors of a linear layer or a convolution of this weight."""
    ones = [1] * (len(shape) - 2)
    return {"A": noise(rank, *shape[1:], key=key), "B": noise(shape[0], rank, *ones, key=key + 1)}


def kohya_lora(
    layers: Mapping[str, tuple[int, ...]], rank: int = 2, alpha: float | None = 1.0, leaves=("lora_down", "lora_up")
) -> dict[str, Tensor]:
    """Keys of kohya's trainer for layers under underscored names."""
    tensors = {}
    for number, (name, shape) in enumerate(layers.items()):
        factors = lora(shape, rank, number)
        tensors[f"{name}.{leaves[0]}.weight"], tensors[f"{name}.{leaves[1]}.weight"] = factors["A"], factors["B"]
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    return path


def original_layers(architecture: Architecture, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Denoiser layers under original names, of the weight's shape, whose names hold one of some words."""
    network = architecture.networks[architecture.denoiser]
    found = {}
    for name, pieces in network.original().items():
        rows = sum(piece.stop - piece.start for piece in pieces)
        shape = network.layers[pieces[0].module]
        if len(shape) > 1 and any(word in name for word in words):
            found[name] = (rows, *shape[1:])
    return found


def raw(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path
