"""The base with the adapter added into its weights, as a diffusers pipeline folder.

Everything is added in double precision and rounded once. Rounding can swallow an adapter: its changes are
often smaller than the gap between two half-precision numbers. What is lost is measured per module as

    | cast(W + D) - (cast(W) + D) | / | D |        (Frobenius norms)

with D the adapter's change and cast the rounding to the written number format: the difference between the two
things a user can run in that format, the merged model and the rounded base with the adapter beside it. The
rounding of the base alone is thus not blamed on the adapter, and with a base already in that format cast(W)
is W. Over all modules the squares of both norms are summed; more than LARGEST_LOSS of the adapter is refused.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from finetune import storage
from finetune.adapters.files import delta_weight
from finetune.export.adapter import shortened
from finetune.export.job import ExportError, Job
from finetune.export.metadata import private_parts
from finetune.families.text import canonical, installed_name
from finetune.sampling import adapter_targets, build_pipeline

LARGEST_LOSS = 0.01
"""Share of the adapter's effect on the weights that rounding may take."""
PRIVATE_KEYS = ("_name_or_path", "name_or_path")
"""Where libraries note the folder a model was loaded from."""


@dataclass(frozen=True)
class Rounding:
    """What rounding takes from the adapter, as shares: of all modules, and of the module that loses most."""

    total: float
    worst: float
    worst_module: str


def write_merged(job: Job, path: Path) -> Rounding:
    """Write the pipeline folder.

    Raises:
        ExportError: if rounding disturbs more than LARGEST_LOSS of the change and the job is not forced, if a
            weight is too large for the number format, or if a configuration names something private.
    """
    rounding = measure_rounding(job)
    if rounding.total > LARGEST_LOSS and not job.force:
        wider = "write the merged model in fp32, " if job.dtype != torch.float32 else ""
        raise ExportError(
            f"Merged in {job.dtype_name}, rounding would disturb the weights by {rounding.total:.1%} of what "
            f"the adapter changes (limit {LARGEST_LOSS:.0%}; {rounding.worst_module}: {rounding.worst:.1%}).",
            [f"{wider}use the adapter unmerged (kohya, diffusers), or force it."],
        )
    pipeline = build_pipeline(job.family, job.components)
    pipeline.save_config(path)
    pipeline.scheduler.save_pretrained(path / "scheduler")
    for name, tokenizer in job.components.tokenizers.items():
        folder = path / name.replace("text_encoder", "tokenizer")
        tokenizer.save_pretrained(folder)
        # transformers 4 reads vocab.json and merges.txt, which transformers 5 no longer writes.
        if hasattr(tokenizer, "backend_tokenizer"):
            tokenizer.backend_tokenizer.model.save(str(folder))
    for component, network in _all_networks(job):
        _write_network(job, component, network, path / component)
    _scrub(path)
    return rounding


def measure_rounding(job: Job) -> Rounding:
    """How much of the adapter the job's number format keeps; see the top of this file."""
    lost_sum = kept_sum = 0.0
    worst, worst_module = 0.0, ""
    for (component, module), weight, delta in _changes(job):
        exact = weight.double() + delta
        lost = float(((exact.to(job.dtype).double() - weight.to(job.dtype).double()) - delta).norm())
        size = float(delta.norm())
        lost_sum, kept_sum = lost_sum + lost**2, kept_sum + size**2
        if lost / size >= worst:
            worst, worst_module = lost / size, f"{component}.{module}"
    return Rounding(math.sqrt(lost_sum / kept_sum), worst, worst_module)


def merged_tensors(job: Job, component: str, network: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a network with the adapter added, under installed names, in the job's number format.

    Raises:
        ExportError: if a finite weight is too large for the number format.
    """
    changed = {
        f"{installed_name(network, component, module)}.weight": delta
        for (_, module), _, delta in _changes(job, component)
    }
    tensors, overflowing = {}, []
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            tensors[name] = tensor.cpu()
            continue
        exact = tensor.double().cpu() + changed[name] if name in changed else tensor.cpu()
        tensors[name] = exact.to(job.dtype)
        if not bool(torch.isfinite(tensors[name]).all()):
            overflowing.append(f"{component}.{name} reaches {float(exact.abs().max()):.3g}.")
    if overflowing:
        raise ExportError(
            f"The merged weights do not fit {job.dtype_name}. Write the merged model as bf16 or fp32.",
            shortened(overflowing),
        )
    return tensors


def _changes(job: Job, only: str | None = None) -> Iterator[tuple[tuple[str, str], Tensor, Tensor]]:
    """((component, module), live weight, change in double precision), on the CPU; of one network or all."""
    layers: dict[tuple[str, str], Any] = adapter_targets(job.family, job.components, job.file)
    for component, module, down, up in job.file.modules():
        if only not in (None, component):
            continue
        change = delta_weight(down.double(), up.double()) * job.file.scale(component)
        yield (component, module), layers[component, module].weight.detach().cpu(), change.cpu()


def _all_networks(job: Job) -> Iterator[tuple[str, nn.Module]]:
    yield from job.networks()
    assert job.components.vae is not None, "a pipeline folder needs the autoencoder"
    yield "vae", job.components.vae


def _write_network(job: Job, component: str, network: nn.Module, folder: Path) -> None:
    """Configuration and weights, under the file names diffusers and transformers look for."""
    tensors = merged_tensors(job, component, network)
    if isinstance(network, ModelMixin):
        network.save_config(folder)
        file_name = "diffusion_pytorch_model.safetensors"
    else:
        config = copy.deepcopy(network.config)
        config.dtype = job.dtype
        config.architectures = [type(network).__name__]
        config.save_pretrained(folder)
        file_name = "model.safetensors"
    named = {canonical(network, component, name): tensor for name, tensor in tensors.items()}
    storage.write_safetensors(folder / file_name, named, {"format": "pt"})


def _scrub(folder: Path) -> None:
    """Take the names of local folders out of every configuration the libraries wrote."""
    problems = []
    for file in sorted(folder.rglob("*.json")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or file.name in {"vocab.json", "tokenizer.json"}:
            continue
        public = {key: entry for key, entry in value.items() if key not in PRIVATE_KEYS}
        if public != value:
            # keep: schedulers may hold -Infinity, which the libraries write and read; plain json does too.
            storage.write_text(file, json.dumps(public, indent=2, ensure_ascii=False) + "\n")
        problems += [
            f"{file.name} holds {part}." for text in _strings(public) for part in private_parts(text)
        ]
    if problems:
        raise ExportError(
            "A configuration of the base names something private; take it out of the base.", problems
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)
