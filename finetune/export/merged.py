"""The base with the adapter added into its weights, as a diffusers pipeline folder or one file in the original layout.

Everything is added in double precision and rounded once. Rounding can swallow an adapter: its changes are
often smaller than the gap between two half-precision numbers. What is lost is measured per layer as

    | cast(W + D) - (cast(W) + D) | / | D |        (Frobenius norms)

with D the adapter's change and cast the rounding to the written number format: the difference between the two
things a user can run in that format, the merged model and the rounded base with the adapter beside it. The
rounding of the base alone is thus not blamed on the adapter, and with a base already in that format cast(W)
is W. Over all layers the squares of both norms are summed; more than LARGEST_LOSS of the adapter is refused.

Tensors are made one at a time, when they are written, and what rounding took is summed up on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from finetune.export.errors import ExportError
from finetune.export.folders import Words, save_config, scrub, with_words, word_rows
from finetune.export.job import Job, Outcome, Rounding
from finetune.export.streaming import Digests, Plan, planned, write
from finetune.families.original_keys import IDENTITY, Layout, config_of, to_original
from finetune.families.text import canonical
from finetune.interchange.into_base import LARGEST_LOSS
from finetune.sampling.generate import build_pipeline


def write_merged(job: Job, path: Path) -> Outcome:
    """Write the pipeline folder; learned words become part of its tokenizers and text encoders.

    Raises:
        ExportError: if rounding disturbs more than LARGEST_LOSS of the change and the job is not forced, if a
            weight is too large for the number format, or if a configuration names something private.
    """
    tally = Tally()
    write_configs(job, path)
    digests = {}
    for component, network in all_networks(job):
        plan = network_plan(job, component, network, tally)
        named = {canonical(network, component, name): entry for name, entry in plan.items()}
        storage_name = "diffusion_pytorch_model" if isinstance(network, ModelMixin) else "model"
        file = path / component / f"{storage_name}.safetensors"
        digests[file] = _write(job, file, named, {"format": "pt"}, f"{component}.")
    return Outcome(rounding=_checked(job, tally), digests=digests)


def write_single(job: Job, path: Path) -> Outcome:
    """Write one file in the original layout, for `from_single_file`, A1111 and ComfyUI.

    Raises:
        ExportError: as `write_merged`.
        ConfigError: if a network holds something that such files have no place for.
    """
    tally = Tally()
    digests = _write(job, path, single_plan(job, tally), metadata.modelspec(job, kind=""), hashed=True)
    words = job.file.header.tokens
    notes = (f"the words {', '.join(words)} are stored in separate files.",) if words else ()
    return Outcome(rounding=_checked(job, tally), notes=notes, digests={path: digests})


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


@dataclass
class Tally:
    """What rounding took of all layers so far, as sums of squares; see the top of this file."""

    lost: float = 0.0
    whole: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def add(self, name: str, weight: Tensor, delta: Tensor, merged: Tensor) -> None:
        """Count one weight: as it was, what is added to it, and what both became in the written number format."""
        lost = float(((merged.double() - weight.to(merged.dtype).double()) - delta).norm())
        size = float(delta.norm())
        self.lost, self.whole = self.lost + lost**2, self.whole + size**2
        if size:
            self.worst = max(self.worst, (lost / size, name))

    def rounding(self) -> Rounding:
        """The sums as shares."""
        return Rounding(math.sqrt(self.lost / self.whole) if self.whole else 0.0, *self.worst)


def network_plan(job: Job, component: str, network: nn.Module, tally: Tally) -> Plan:
    """Every tensor of a network with the adapter added, under installed names, in the job's number format."""
    touched: dict[int, Callable[[Tensor, torch.dtype], Tensor]] = {}
    for (owner, module), change in changes(job).items():
        if owner == component:
            for name, parameter in change.layer.named_parameters(recurse=False):
                touched[id(parameter)] = partial(_changed, change, name, f"{component}.{module}", tally)
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


def single_plan(job: Job, tally: Tally) -> Plan:
    """Every tensor of a single file in the original layout."""
    plan: dict[str, Any] = {}
    for component, network in all_networks(job):
        plain = network_plan(without_words(job), component, network, tally)
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


def _changed(change: Change, name: str, module: str, tally: Tally, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter with what the adapter adds to it, rounded once."""
    delta = change.deltas().get(name)
    if delta is None:
        return weight.to(dtype)
    merged = (weight.double() + delta).to(dtype)
    tally.add(module, weight, delta, merged)
    return merged


def _made(
    tensor: Tensor, changed: Callable[[Tensor, torch.dtype], Tensor] | None, dtype: torch.dtype, words: Words | None
) -> Tensor:
    weight = tensor.detach().cpu()
    made = changed(weight, dtype) if changed else weight.to(dtype)
    if words is not None:
        first, vectors = words
        made = torch.cat([made[:first], vectors.to(dtype), made[first + len(vectors) :]])
    return made


def _write(
    job: Job, path: Path, plan: Plan, entries: dict[str, str], prefix: str = "", *, hashed: bool = False
) -> Digests:
    """Write a planned file and refuse weights that the number format has no words for."""
    overflowing: list[str] = []

    def watched(name: str, make: Callable[[], Tensor]) -> Tensor:
        tensor = make()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            overflowing.append(f"{prefix}{name} is beyond {torch.finfo(tensor.dtype).max:.5g}.")
        return tensor

    watching = {name: replace(entry, make=partial(watched, name, entry.make)) for name, entry in plan.items()}
    digests = write(path, watching, entries, hashed=hashed)
    if overflowing:
        raise ExportError(
            f"The merged weights do not fit {job.dtype_name}. Write the merged model as bf16 or fp32.",
            first_few(overflowing),
        )
    return digests


def _checked(job: Job, tally: Tally) -> Rounding:
    rounding = tally.rounding()
    if rounding.total > LARGEST_LOSS and not job.force:
        wider = "write it with --dtype fp32, " if job.dtype != torch.float32 else ""
        raise ExportError(
            f"Merged in {job.dtype_name}, rounding would disturb the weights by {rounding.total:.1%} of what "
            f"the adapter changes (limit {LARGEST_LOSS:.0%}; {rounding.worst_module}: {rounding.worst:.1%}).",
            [f"{wider}use the adapter unmerged (kohya, diffusers), or keep it with --force."],
        )
    return rounding


def all_networks(job: Job) -> Iterator[tuple[str, nn.Module]]:
    """Every network of the base, the autoencoder too."""
    yield from job.networks()
    assert job.components.vae is not None, "a whole model needs the autoencoder"
    yield "vae", job.components.vae
