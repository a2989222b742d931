"""Read written files the way their users' programs do, into networks that can be compared with the live ones.

Readers never touch the live base: they get copies of its networks that share the weights, so no memory is
doubled.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import first_few
from finetune.export import kohya_reader, merged
from finetune.export.changes import Deltas, deltas
from finetune.export.job import ExportError, Job
from finetune.export.merged import all_networks, network_plan, single_plan
from finetune.export.streaming import differing
from finetune.families import Choices, load_family
from finetune.families.base import Components
from finetune.families.text import canonical
from finetune.interchange.adapter import Place
from finetune.sampling import build_pipeline

ADAPTER = "exported"


@dataclass
class Reading:
    """What a reader made of a file.

    Attributes:
        components: networks that behave as the reader's do.
        deltas: what the reader adds per layer; None where the file holds sums that were compared bit by bit
            already.
        modules: how many layers the reader changed.
        dtype: narrowest number format in which the reader holds changes.
        words: whether it knows the learned words.
    """

    components: Components
    deltas: Deltas | None
    modules: int
    dtype: torch.dtype
    words: bool = False


def read_diffusers(job: Job, path: Path) -> Reading:
    """`pipeline.load_lora_weights`, as every diffusers user calls it."""
    components = shared_copies(job)
    pipeline = build_pipeline(job.family, components)
    pipeline.load_lora_weights(
        str(path.parent),
        weight_name=path.name,
        adapter_name=ADAPTER,
        local_files_only=True,
        use_safetensors=True,
    )
    return _peft_reading(replace(job, components=components), components, ADAPTER)


def read_peft(job: Job, path: Path) -> Reading:
    """`PeftModel.from_pretrained` on every network that has a folder."""
    components = shared_copies(job)
    copied = replace(job, components=components)
    for component, network in copied.networks():
        if (path / component).is_dir():
            peft.PeftModel.from_pretrained(network, str(path / component), adapter_name=ADAPTER)
    return _peft_reading(copied, components, ADAPTER)


def read_kohya(job: Job, path: Path) -> Reading:
    """By the rules of sd-scripts, A1111, ComfyUI and InvokeAI; see `kohya_reader`."""
    components = shared_copies(job)
    copied = replace(job, components=components)
    found = kohya_reader.read(copied, path)
    found = {place: function for place, function in found.items() if any(bool(d.any()) for d in function().values())}
    modules = {
        (component, canonical(network, component, name)): layer
        for component, network in copied.networks()
        for name, layer in network.named_modules()
    }
    for place, function in found.items():
        _add(modules[place], function)
    return Reading(components, found, len(found), torch.float32)


def read_merged(job: Job, path: Path) -> Reading:
    """`DiffusionPipeline.from_pretrained`; every tensor must be bit for bit what was to be written."""
    problems = []
    for component, network in all_networks(job):
        files = list((path / component).glob("*.safetensors"))
        plan = network_plan(job, component, network)
        named = {canonical(network, component, name): entry for name, entry in plan.items()}
        problems += [f"{component}.{problem}" for file in files for problem in differing(file, named)]
    if problems:
        raise ExportError(f"{path.name} does not read back as it was written.", first_few(problems))
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
        str(path), torch_dtype=job.dtype, local_files_only=True, use_safetensors=True
    )
    return _pipeline_reading(job, pipeline, words=True)


def read_single(job: Job, path: Path) -> Reading:
    """`from_single_file`, with the configuration of the base instead of one from the hub."""
    problems = list(differing(path, single_plan(job)))
    if problems:
        raise ExportError(f"{path.name} does not read back as it was written.", first_few(problems))
    folder = path.parent / ".configuration"
    try:
        merged.write_configs(merged.without_words(job), folder)
        constructor = getattr(diffusers, job.family.pipeline_for(job.components.denoiser.config))
        pipeline: Any = constructor.from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=job.dtype
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _pipeline_reading(job, pipeline, words=False)


def read_original(job: Job, path: Path) -> Reading:
    """This toolkit's own reader of single files, which takes every tensor or none."""
    folder = path.parent / ".configuration"
    prediction = job.components.scheduler_config.get("prediction_type")
    try:
        merged.write_configs(merged.without_words(job), folder)
        choices = Choices(skeleton=folder, prediction=prediction if job.family.denoiser == "unet" else None)
        _, components = load_family(str(path), dtype=torch.float32, choices=choices)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Reading(components, None, len(deltas(job)), job.dtype)


READERS: dict[str, Callable[[Job, Path], Reading]] = {
    "diffusers": read_diffusers,
    "kohya": read_kohya,
    "peft": read_peft,
    "pipeline": read_merged,
    "from_single_file": read_single,
    "original": read_original,
}
"""name -> how that kind of program reads a file."""


def shared_copies(job: Job) -> Components:
    """The networks once more, free to be changed in structure; their weights are the live ones."""
    components = job.components
    return replace(
        components,
        denoiser=_shared_copy(components.denoiser),
        text_encoders={name: _shared_copy(network) for name, network in components.text_encoders.items()},
        tokenizers={name: copy.deepcopy(tokenizer) for name, tokenizer in components.tokenizers.items()},
    )


def _shared_copy(network: nn.Module) -> nn.Module:
    weights = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in weights})


def _pipeline_reading(job: Job, pipeline: Any, *, words: bool) -> Reading:
    live = dict(job.networks())

    def like_live(component: str) -> Any:
        parameter = next(live[component].parameters())
        return getattr(pipeline, component).eval().to(parameter.device, parameter.dtype)

    components = replace(
        job.components,
        denoiser=like_live(job.family.denoiser),
        vae=pipeline.vae,
        text_encoders={name: like_live(name) for name in job.components.text_encoders},
        tokenizers={
            name: getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            for name in job.components.tokenizers
        },
    )
    return Reading(components, None, len(deltas(job)), job.dtype, words)


def _peft_reading(job: Job, components: Components, adapter: str) -> Reading:
    found: Deltas = {}
    dtype = job.dtype
    for component, network in job.networks():
        for name, layer in network.named_modules():
            if isinstance(layer, BaseTunerLayer) and adapter in layer.active_adapters and _has(layer, adapter):
                place: Place = component, canonical(network, component, name)
                found[place] = partial(_merged_by_peft, layer)
                own = [p.dtype for n, p in layer.named_parameters() if not n.startswith("base_layer.")]
                dtype = min([dtype, *own], key=lambda held: held.itemsize)
    return Reading(components, found, len(found), dtype)


def _has(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(f".{adapter}." in f".{name}." for name, _ in layer.named_parameters())


def _merged_by_peft(layer: Any) -> dict[str, Tensor]:
    """What PEFT's own merge adds, computed on a copy of the layer in double precision."""
    copied: Any = copy.deepcopy(layer).double()
    base = copied.get_base_layer()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters(recurse=False)}
    copied.merge()
    after = {name: parameter.detach() for name, parameter in copied.get_base_layer().named_parameters(recurse=False)}
    found = {name: (after[name] - before[name]).cpu() for name in before}
    return {name: delta for name, delta in found.items() if name == "weight" or bool(delta.any())}


def _add(layer: nn.Module, function: Callable[[], dict[str, Tensor]]) -> None:
    """Let a copied layer behave as if the change were in it; linear layers and convolutions compute it when called."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        layer.register_forward_hook(_plus(function))
        return
    for name, delta in function().items():
        own = layer.get_parameter(name)
        setattr(layer, name, nn.Parameter((own.double().cpu() + delta).to(own), requires_grad=False))


def _plus(function: Callable[[], dict[str, Tensor]]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        change = {name: delta.to(output.device, torch.float32) for name, delta in function().items()}
        wide = inputs[0].float()
        weight, bias = change.get("weight"), change.get("bias")
        if weight is None:
            shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
            assert bias is not None, "one of the two is changed"
            return output + bias.reshape(shape).to(output.dtype)
        if isinstance(layer, nn.Conv2d):
            return output + layer._conv_forward(wide, weight, bias).to(output.dtype)
        return output + functional.linear(wide, weight, bias).to(output.dtype)

    return add
