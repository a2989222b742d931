"""How programs with kohya's layout understand a file, by their own rules and with none of their code.

A key is the network's prefix and the layer's dotted name with underscores. A program that runs a family's original
network (sd-scripts from SDXL on, A1111, ComfyUI) uses its original names there, where several of our layers may stand
in one; those come from the tables of single files, not from the ones the file was written with.

Sources: sd-scripts networks/lora.py; stable-diffusion-webui extensions-builtin/Lora/network_*.py; ComfyUI
    comfy/weight_adapter; KohakuBlueleaf/LyCORIS modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import storage
from finetune.errors import first_few
from finetune.export.changes import Deltas
from finetune.export.errors import ExportError
from finetune.export.interchange import architecture
from finetune.export.job import Job
from finetune.families.original_keys import INWARDS, config_of
from finetune.families.text import canonical
from finetune.interchange.adapter import Place

Parts = Mapping[str, Tensor]
"""What a file holds for one key, by ending."""


@dataclass(frozen=True)
class Member:
    """One of our layers in a layer of a program: its rows from `start` on, in another form."""

    place: Place
    layer: nn.Module
    form: str
    start: int
    rows: int


def read(job: Job, path: Path) -> Deltas:
    """What a file adds to each layer of the base.

    Raises:
        ExportError: for keys that programs would not load.
    """
    tensors, _ = storage.read_safetensors(path)
    layers = _names(job)
    stems: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, ending = name.partition(".")
        stems.setdefault(stem, {})[ending] = tensor
    if unknown := sorted(set(stems) - set(layers)):
        raise ExportError("Programs that read the kohya layout would not load these keys.", first_few(unknown))
    found: Deltas = {}
    for stem in sorted(stems):
        members = layers[stem]
        rows = sum(member.rows for member in members)
        for member in members:
            found[member.place] = partial(_deltas, stems[stem], member, rows, alone=len(members) == 1)
    return found


def change(parts: Parts, weight: Tensor | None) -> Tensor | None:
    """What a layer's tensors add to its weight, (out, in * kernel) or as the weight; in double precision.

    A missing or zero alpha means alpha = rank; two whole Kronecker factors have no rank and strength 1.

    Raises:
        ExportError: for endings that no program knows.
    """
    wide = {name: tensor.double() for name, tensor in parts.items()}
    alpha = float(wide.get("alpha", torch.zeros(())))

    def scaled(delta: Tensor, rank: int | None) -> Tensor:
        return delta * (alpha / rank if rank and alpha else 1.0)

    if "lora_up.weight" in wide:
        up, down = wide["lora_up.weight"], wide["lora_down.weight"]
        return scaled(torch.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1)), len(down))
    if "hada_w1_a" in wide:
        return scaled(_half(wide, "1") * _half(wide, "2"), wide["hada_w1_b"].shape[0])
    if any(name.startswith("lokr_") for name in wide):
        left, right, rank = _kronecker(wide)
        return scaled(torch.kron(left.reshape(*left.shape, *[1] * (right.ndim - 2)), right), rank)
    if "on_input" in wide:
        assert weight is not None, "gains need the weight"
        gains = wide["weight"].reshape((1, -1) if bool(wide["on_input"]) else (-1, 1))
        return weight.flatten(1).double() * gains if weight.ndim == 2 else _by_channel(weight, wide)
    if not set(wide) <= {"diff", "diff_b"}:
        raise ExportError(f"Programs that read the kohya layout do not know tensors named {', '.join(sorted(wide))}.")
    return wide.get("diff")


def _deltas(parts: Parts, member: Member, rows: int, *, alone: bool) -> dict[str, Tensor]:
    layer: Any = member.layer
    weight: Tensor = layer.weight
    delta = change(parts, weight.detach().cpu() if alone else None)
    found = {}
    if delta is not None:
        cut = delta.reshape(rows, -1)[member.start : member.start + member.rows]
        found["weight"] = INWARDS[member.form](cut.reshape(weight.shape))
    if "diff_b" in parts:
        cut = parts["diff_b"].double()[member.start : member.start + member.rows]
        found["bias"] = INWARDS[member.form](cut)
    return found


def _names(job: Job) -> dict[str, list[Member]]:
    """Key -> the layers that a program means by it."""
    found: dict[str, list[Member]] = {}
    original = architecture(job).kohya_names == "original"
    for component, network in job.networks():
        denoiser = component == job.family.denoiser
        prefix = job.family.kohya_prefixes["denoiser" if denoiser else component]
        settings = config_of(network)
        stacks: dict[str, list[tuple[int, str, Place, nn.Module]]] = {}
        for name, layer in network.named_modules():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, nn.Parameter):
                continue
            module = canonical(network, component, name)
            spelled, part, form = module, 0, "same"
            if original and denoiser:
                place = job.family.original[component].naming(f"{module}.weight", settings)
                spelled, part, form = place.name.removesuffix(".weight"), place.part, place.form
            stacks.setdefault(spelled, []).append((part, form, (component, module), layer))
        for spelled, members in stacks.items():
            found[f"{prefix}_{spelled}".replace(".", "_")] = _stacked(members)
    return found


def _stacked(members: list[tuple[int, str, Place, nn.Module]]) -> list[Member]:
    result, start = [], 0
    for _, form, place, layer in sorted(members, key=lambda member: member[0]):
        weight: Any = layer.weight
        result.append(Member(place, layer, "same" if form == "convolution" else form, start, len(weight)))
        start += len(weight)
    return result


def _half(wide: Parts, number: str) -> Tensor:
    first, second = wide[f"hada_w{number}_a"], wide[f"hada_w{number}_b"]
    if f"hada_t{number}" not in wide:
        return first @ second
    return torch.einsum("ijkl,jr,ip->prkl", wide[f"hada_t{number}"], second, first)


def _kronecker(wide: Parts) -> tuple[Tensor, Tensor, int | None]:
    rank = None
    factors = []
    for number in ("1", "2"):
        whole = wide.get(f"lokr_w{number}")
        if whole is None:
            first, second = wide[f"lokr_w{number}_a"], wide[f"lokr_w{number}_b"]
            rank = second.shape[0]
            core = wide.get("lokr_t2") if number == "2" else None
            whole = first @ second if core is None else torch.einsum("ijkl,jr,ip->prkl", core, second, first)
        factors.append(whole)
    return factors[0], factors[1], rank


def _by_channel(weight: Tensor, wide: Parts) -> Tensor:
    shape = (1, -1, 1, 1) if bool(wide["on_input"]) else (-1, 1, 1, 1)
    return weight.double() * wide["weight"].reshape(shape)
