"""The base with the adapter added into its weights, as a diffusers pipeline folder or one file in the original layout.

Everything is added in double precision and rounded once. Rounding can swallow an adapter: its changes are
often smaller than the gap between two half-precision numbers. What is lost is measured per layer as

    | cast(W + D) - (cast(W) + D) | / | D |        (Frobenius norms)

with D the adapter's change and cast the rounding to the written number format: the difference between the two
things a user can run in that format, the merged model and the rounded base with the adapter beside it. The
rounding of the base alone is thus not blamed on the adapter, and with a base already in that format cast(W)
is W. Over all layers the squares of both norms are summed; more than LARGEST_LOSS of the adapter is refused.

Tensors are made one at a time, when they are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from finetune.adapters.files import TOKENS, AdapterFile
from finetune.errors import first_few
from finetune.export import metadata
from finetune.export.changes import Change, changes
from finetune.export.folders import Words, save_config, scrub, with_words, word_rows
from finetune.export.job import ExportError, Job, Outcome, Rounding
from finetune.export.streaming import Plan, planned, write
from finetune.families.original_keys import IDENTITY, Layout, config_of, to_original
from finetune.families.text import canonical
from finetune.interchange.into_base import LARGEST_LOSS
from finetune.sampling import build_pipeline


def write_merged(job: Job, path: Path) -> Outcome:
    """Write the pipeline folder; learned words become part of its tokenizers and text encoders.

    Raises:
        ExportError: if rounding disturbs more than LARGEST_LOSS of the change and the job is not forced, if a
            weight is too large for the number format, or if a configuration names something private.
    """
    rounding = _checked_rounding(job)
    write_configs(job, path)
    for component, network in all_networks(job):
        plan = network_plan(job, component, network)
        named = {canonical(network, component, name): entry for name, entry in plan.items()}
        storage_name = "diffusion_pytorch_model" if isinstance(network, ModelMixin) else "model"
        _write(job, path / component / f"{storage_name}.safetensors", named, {"format": "pt"})
    return Outcome(rounding=rounding)


def write_single(job: Job, path: Path) -> Outcome:
    """Write one file in the original layout, for `from_single_file`, A1111 and ComfyUI.

    Raises:
        ExportError: as `write_merged`.
        ConfigError: if a network holds something that such files have no place for.
    """
    rounding = _checked_rounding(job)
    _write(job, path, single_plan(job), metadata.modelspec(job, kind=""), hashed=True)
    words = job.file.header.tokens
    notes = (f"the words {', '.join(words)} stand in files of their own.",) if words else ()
    return Outcome(rounding=rounding, notes=notes)


def write_configs(job: Job, path: Path) -> None:
    """A pipeline folder without its weights."""
    pipeline = build_pipeline(job.family, job.components)
    pipeline.save_config(path)
    pipeline.scheduler.save_pretrained(path / "scheduler")
    for name, own in job.components.tokenizers.items():
        folder = path / name.replace("text_encoder", "tokenizer")
        tokenizer = with_words(job, name, own)
        tokenizer.save_pretrained(folder)
        # transformers 4 reads vocab.json and merges.txt, which transformers 5 no longer writes.
        if hasattr(tokenizer, "backend_tokenizer"):
            tokenizer.backend_tokenizer.model.save(str(folder))
    for component, network in all_networks(job):
        rows = word_rows(job, component, network)
        save_config(network, path / component, job.dtype, rows.count if rows else None)
    scrub(path)


def measure_rounding(job: Job) -> Rounding:
    """How much of the adapter the job's number format keeps; see the top of this file."""
    lost_sum = kept_sum = 0.0
    worst, worst_module = 0.0, ""
    for (component, module), change in changes(job).items():
        layer: Any = change.layer
        for name, delta in change.deltas().items():
            weight = getattr(layer, name).detach().cpu()
            exact = weight.double() + delta
            lost = float(((exact.to(job.dtype).double() - weight.to(job.dtype).double()) - delta).norm())
            size = float(delta.norm())
            lost_sum, kept_sum = lost_sum + lost**2, kept_sum + size**2
            if size and lost / size >= worst:
                worst, worst_module = lost / size, f"{component}.{module}"
    return Rounding(math.sqrt(lost_sum / kept_sum) if kept_sum else 0.0, worst, worst_module)


def network_plan(job: Job, component: str, network: nn.Module) -> Plan:
    """Every tensor of a network with the adapter added, under installed names, in the job's number format."""
    touched: dict[int, tuple[Change, str]] = {}
    for (owner, _), change in changes(job).items():
        if owner == component:
            for name, parameter in change.layer.named_parameters(recurse=False):
                touched[id(parameter)] = change, name
    rows = word_rows(job, component, network)
    plan = {}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, tensor in network.state_dict().items():
        parameter = parameters.get(name)
        changed = touched.get(id(parameter)) if parameter is not None else None
        wide = rows if rows and parameter is rows.table else None
        dtype = job.dtype if tensor.is_floating_point() else tensor.dtype
        shape = (wide.count, tensor.shape[1]) if wide else tuple(tensor.shape)
        plan[name] = planned(shape, dtype, partial(_made, tensor, changed, dtype, wide.words if wide else None))
    return plan


def single_plan(job: Job) -> Plan:
    """Every tensor of a single file in the original layout."""
    plan: dict[str, Any] = {}
    for component, network in all_networks(job):
        plain = network_plan(without_words(job), component, network)
        plan |= _original(job.family.original[component], component, network, plain)
    if job.family.denoiser == "unet" and job.components.scheduler_config.get("prediction_type") == "v_prediction":
        # keep: ComfyUI, Forge and this toolkit take an empty tensor of this name for "predicts v".
        plan["v_pred"] = planned((0,), torch.float32, partial(torch.zeros, 0))
        if job.components.scheduler_config.get("rescale_betas_zero_snr"):
            plan["ztsnr"] = planned((0,), torch.float32, partial(torch.zeros, 0))
    return plan


def without_words(job: Job) -> Job:
    """The job without learned words, for files whose vocabulary has a fixed size."""
    words = {name for name in job.file.tensors if (place := job.file.place(name)) and place[1] == TOKENS}
    tensors = {name: tensor for name, tensor in job.file.tensors.items() if name not in words}
    return replace(job, file=AdapterFile(tensors, replace(job.file.header, tokens=())))


def _original(layout: Layout, component: str, network: nn.Module, plain: Plan) -> Iterator[tuple[str, Any]]:
    """The same tensors under the names of an original file; those that stand in one tensor there are made together."""
    groups: dict[str, list[str]] = {}
    settings = config_of(network)
    for name in plain:
        place = layout.naming(canonical(network, component, name), settings)
        if place.form == IDENTITY:
            to_original(layout, component, network, {name: plain[name].make()})
        else:
            groups.setdefault(place.name, []).append(name)

    def make(members: list[str], tensors: Callable[[str], Tensor]) -> Tensor:
        (found,) = to_original(layout, component, network, {name: tensors(name) for name in members}).values()
        return found

    for name, members in groups.items():
        like = make(members, lambda member: plain[member].like)
        yield (
            layout.prefixes[0] + name,
            planned(tuple(like.shape), like.dtype, partial(make, members, lambda member: plain[member].make())),
        )


def _made(tensor: Tensor, changed: tuple[Change, str] | None, dtype: torch.dtype, words: Words | None) -> Tensor:
    exact = tensor.detach().cpu()
    if changed is not None:
        change, parameter = changed
        delta = change.deltas().get(parameter)
        exact = exact if delta is None else exact.double() + delta
    if words is not None:
        first, vectors = words
        exact = torch.cat([exact[:first], vectors.to(exact.dtype), exact[first + len(vectors) :]])
    return exact.to(dtype)


def _write(job: Job, path: Path, plan: Plan, entries: dict[str, str], *, hashed: bool = False) -> None:
    """Write a planned file and refuse weights that the number format has no words for."""
    overflowing: list[str] = []

    def watched(name: str, make: Callable[[], Tensor]) -> Tensor:
        tensor = make()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            overflowing.append(f"{path.parent.name}.{name} is beyond {torch.finfo(tensor.dtype).max:.5g}.")
        return tensor

    write(
        path,
        {name: type(entry)(entry.like, partial(watched, name, entry.make)) for name, entry in plan.items()},
        entries,
        hashed=hashed,
    )
    if overflowing:
        raise ExportError(
            f"The merged weights do not fit {job.dtype_name}. Write the merged model as bf16 or fp32.",
            first_few(overflowing),
        )


def _checked_rounding(job: Job) -> Rounding:
    rounding = measure_rounding(job)
    if rounding.total > LARGEST_LOSS and not job.force:
        wider = "write the merged model in fp32, " if job.dtype != torch.float32 else ""
        raise ExportError(
            f"Merged in {job.dtype_name}, rounding would disturb the weights by {rounding.total:.1%} of what "
            f"the adapter changes (limit {LARGEST_LOSS:.0%}; {rounding.worst_module}: {rounding.worst:.1%}).",
            [f"{wider}use the adapter unmerged (kohya, diffusers), or force it."],
        )
    return rounding


def all_networks(job: Job) -> Iterator[tuple[str, nn.Module]]:
    """Every network of the base, the autoencoder too."""
    yield from job.networks()
    assert job.components.vae is not None, "a whole model needs the autoencoder"
    yield "vae", job.components.vae
