"""Adapter files in the layouts their readers expect.

The strength is folded into lora_B, so that alpha equals the rank wherever a layout has a place for it:
readers disagree about alpha (diffusers ignores it without metadata and mixes up per-module values in kohya
layout), and none can go wrong with a scale of one. Key names are the canonical ones: text encoder modules
carry `text_model.`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from finetune import storage
from finetune.adapters.files import DOWN, UP
from finetune.export import metadata
from finetune.export.job import ExportError, Job
from finetune.families.text import canonical, installed_name
from finetune.sampling import adapter_targets

SHOWN = 8
PEFT_FIELDS = {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True}


def check(job: Job) -> None:
    """Refuse an adapter that is not worth a file.

    Raises:
        CheckpointError: if it contradicts itself or does not fit the base.
        ExportError: if a tensor is not finite or a module has learnt nothing; all are listed.
    """
    adapter_targets(job.family, job.components, job.file)
    if job.file.header.method != "lora":
        raise ExportError(
            f"The adapter was trained with method {job.file.header.method!r}, and no layout is known for it.",
            ["export an adapter of method 'lora'."],
        )
    broken, idle = [], []
    for component, module, down, up in job.file.modules():
        for name, tensor in ((DOWN, down), (UP, up)):
            if not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                broken.append(f"{component}.{module}{name} has {count} values that are not finite.")
            elif not bool(tensor.any()):
                idle.append(f"{component}.{module}{name} is all zero: the module has learnt nothing.")
    if not job.file.tensors:
        idle.append("it holds no tensors at all.")
    if broken or idle:
        raise ExportError(
            "The adapter cannot be exported. Export an earlier checkpoint of the run"
            + (
                ", or train again with a lower learning rate."
                if broken
                else ", or train it at least one step."
            ),
            shortened([*broken, *idle]),
        )


def write_diffusers(job: Job, path: Path) -> None:
    """One file with PEFT keys for `pipeline.load_lora_weights`.

    Source: diffusers 0.42 loaders/lora_pipeline.py. Never its `convert_state_dict_to_diffusers`: mixed keys
        lose the attention layers on loading (diffusers#14548).
    """
    tensors = {}
    for component, module, down, up in _folded(job, None):
        tensors[f"{component}.{module}{DOWN}"] = down
        tensors[f"{component}.{module}{UP}"] = up
    settings: dict[str, object] = {}
    for component in job.file.components():
        rank = job.file.header.rank[component]
        # keep: only fields every PEFT knows; the reader passes all to LoraConfig, which refuses others.
        settings[f"{component}.r"] = rank
        settings[f"{component}.lora_alpha"] = rank
        settings[f"{component}.target_modules"] = target_suffixes(job, component)
    text = json.dumps(settings, sort_keys=True)
    storage.write_safetensors(
        path,
        tensors,
        metadata.with_hashes(tensors, {**metadata.modelspec(job), "lora_adapter_metadata": text}),
    )


def write_kohya(job: Job, path: Path) -> None:
    """One file for A1111, Forge, ComfyUI, InvokeAI and sd-scripts: underscored names, one alpha for all.

    Source: sd-scripts networks/lora.py. One alpha, because diffusers applies the wrong one to to_q, q_proj
        and fc1 when modules differ.
    """
    alpha = float(max(job.file.header.rank[component] for component in job.file.components()))
    stored = torch.tensor(alpha, dtype=job.dtype)
    stored = stored if stored.item() == alpha else torch.tensor(alpha)
    tensors = {}
    for component, module, down, up in _folded(job, alpha):
        name = f"{kohya_prefix(job, component)}_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = stored
    described = {**metadata.modelspec(job), **metadata.kohya(job, alpha)}
    storage.write_safetensors(path, tensors, metadata.with_hashes(tensors, described))


def write_peft(job: Job, path: Path) -> None:
    """A folder per network for `PeftModel.from_pretrained`.

    The one layout with the installed library's module names: PEFT adds and strips no `text_model.`, so a text
    encoder's folder is for transformers from 5.6 on, or before, whichever wrote it.
    """
    folded = list(_folded(job, None))
    networks = dict(job.networks())
    for component in job.file.components():
        tensors = {}
        for owner, module, down, up in folded:
            if owner == component:
                name = f"base_model.model.{installed_name(networks[component], component, module)}"
                tensors[f"{name}{DOWN}"], tensors[f"{name}{UP}"] = down, up
        rank = job.file.header.rank[component]
        config = {
            **PEFT_FIELDS,
            "base_model_name_or_path": metadata.public_name(job.file.header.base),
            "r": rank,
            "lora_alpha": rank,
            "target_modules": target_suffixes(job, component),
        }
        storage.write_json(path / component / "adapter_config.json", dict(sorted(config.items())))
        described = metadata.with_hashes(tensors, metadata.modelspec(job))
        storage.write_safetensors(path / component / "adapter_model.safetensors", tensors, described)


def kohya_prefix(job: Job, component: str) -> str:
    """What the keys of a network start with in kohya layout, e.g. "lora_unet"."""
    return job.family.kohya_prefixes["denoiser" if component == job.family.denoiser else component]


def target_suffixes(job: Job, component: str) -> list[str]:
    """The shortest name endings that select exactly the adapter's modules in a network.

    PEFT selects modules by the end of their names. Endings are used, not full names, because they hold for
    every version of transformers, with `text_model.` or without; one that starts with a number ("2") would
    tell nobody anything.
    """
    network = dict(job.networks())[component]
    wanted = {module for owner, module, *_ in job.file.modules() if owner == component}
    others = {canonical(network, component, name) for name, _ in network.named_modules() if name} - wanted
    suffixes: set[str] = set()
    for module in sorted(wanted):
        parts = module.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        suffixes.add(
            next((end for end in endings if not end[0].isdigit() and not _selects(end, others)), module)
        )
    return sorted(suffixes)


def shortened(problems: list[str]) -> list[str]:
    """The first few problems and how many more there are."""
    more = [f"and {len(problems) - SHOWN} more."] if len(problems) > SHOWN else []
    return [*problems[:SHOWN], *more]


def _selects(ending: str, names: set[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for name in names)


def _folded(job: Job, alpha: float | None) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(component, module, A, B) in the job's number format, B folded for a file that says `alpha`.

    Args:
        alpha: what readers will divide by the rank; None means the rank itself.

    Raises:
        ExportError: if a value is too large for the number format; all modules concerned are listed.
    """
    overflowing = []
    result = []
    for component, module, down, up in job.file.modules():
        rank = job.file.header.rank[component]
        factor = job.file.scale(component) * rank / (alpha if alpha is not None else rank)
        pair = (down.double(), up.double() * factor)
        if job.dtype == torch.float16:
            pair = _balanced(*pair)
        cast = [tensor.to(job.dtype) for tensor in pair]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in cast):
            largest = max(float(tensor.abs().max()) for tensor in pair)
            overflowing.append(f"{component}.{module} reaches {largest:.3g}.")
        result.append((component, module, cast[0], cast[1]))
    if overflowing:
        raise ExportError(
            f"The adapter is too strong for {job.dtype_name}: it ends at {torch.finfo(job.dtype).max:.6g}. "
            "Export it as bf16 or fp32.",
            shortened(overflowing),
        )
    yield from result


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of like size; a power of two moves over, which costs no accuracy.

    fp16 has few digits below 6e-5, where lora_B of a short run lives, and ends at 65504.
    """
    shift = round((math.log2(float(down.abs().max())) - math.log2(float(up.abs().max()))) / 2)
    return down * 2.0**-shift, up * 2.0**shift
