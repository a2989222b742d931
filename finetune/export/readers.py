"""Read written files the way their users' programs do, into networks that can be compared with the live ones.

Readers never touch the live base: they get copies of its networks that share the weights, so no memory is
doubled.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

from finetune.export import kohya_reader, merged
from finetune.export.changes import Deltas, deltas
from finetune.export.job import Job
from finetune.export.upcast import HALF
from finetune.families import Choices, load_family
from finetune.families.base import Components
from finetune.families.text import canonical
from finetune.interchange.adapter import Place
from finetune.sampling.generate import build_pipeline

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
    components, give_back = _upcast_copies(job)
    pipeline = build_pipeline(job.family, components)
    pipeline.load_lora_weights(
        str(path.parent),
        weight_name=path.name,
        adapter_name=ADAPTER,
        local_files_only=True,
        use_safetensors=True,
    )
    return _peft_reading(replace(job, components=components), give_back)


def read_peft(job: Job, path: Path) -> Reading:
    """`PeftModel.from_pretrained` on every network that has a folder."""
    components, give_back = _upcast_copies(job)
    copied = replace(job, components=components)
    for component, network in copied.networks():
        if (path / component).is_dir():
            peft.PeftModel.from_pretrained(network, str(path / component), adapter_name=ADAPTER)
    return _peft_reading(copied, give_back)


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
    """`DiffusionPipeline.from_pretrained`."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
        str(path), dtype=job.dtype, local_files_only=True, use_safetensors=True
    )
    return _pipeline_reading(job, pipeline, words=True)


def read_single(job: Job, path: Path) -> Reading:
    """`from_single_file`, with the configuration of the base instead of one from the hub."""
    with _configuration(job, path) as folder:
        constructor = getattr(diffusers, job.family.pipeline_for(job.components.denoiser.config))
        pipeline: Any = constructor.from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=job.dtype
        )
    return _pipeline_reading(job, pipeline, words=False)


def read_original(job: Job, path: Path) -> Reading:
    """This toolkit's own reader of single files, which takes every tensor or none."""
    prediction = job.components.scheduler_config.get("prediction_type")
    with _configuration(job, path) as folder:
        choices = Choices(skeleton=folder, prediction=prediction if job.family.denoiser == "unet" else None)
        _, components = load_family(str(path), dtype=None, choices=choices)
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


@contextmanager
def _configuration(job: Job, path: Path) -> Iterator[Path]:
    """The base's configuration beside a single file, while the block runs."""
    folder = path.parent / ".configuration"
    try:
        merged.write_configs(merged.without_words(job), folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shared_copies(job: Job, instead: Mapping[int, Tensor] | None = None) -> Components:
    """The networks once more, free to be changed in structure; their weights are the live ones.

    Args:
        instead: id of a live weight -> what stands in its place in the copy.
    """
    components = job.components

    def copied(network: nn.Module) -> Any:
        weights = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
        return copy.deepcopy(network, {**weights, **(instead or {})})

    return replace(
        components,
        denoiser=copied(components.denoiser),
        text_encoders={name: copied(network) for name, network in components.text_encoders.items()},
        tokenizers={name: copy.deepcopy(tokenizer) for name, tokenizer in components.tokenizers.items()},
    )


def _upcast_copies(job: Job) -> tuple[Components, Callable[[], None]]:
    """Shared copies that say they are fp32, and what gives them the live weights when an adapter is loaded.

    PEFT rounds an adapter to the number format of the layers it meets; these stand-ins hold one number each.
    """
    live = [weight for _, network in job.networks() for weight in network.parameters() if weight.dtype in HALF]
    instead = {
        id(weight): nn.Parameter(torch.zeros((), device=weight.device).expand(weight.shape), requires_grad=False)
        for weight in live
    }
    own = {id(instead[id(weight)]): weight for weight in live}
    components = shared_copies(job, instead)

    def give_back() -> None:
        for module in chain.from_iterable(root.modules() for root in components.modules().values()):
            for name, parameter in module._parameters.items():
                module._parameters[name] = own.get(id(parameter), parameter)

    return components, give_back


def _pipeline_reading(job: Job, pipeline: Any, *, words: bool) -> Reading:
    live = dict(job.networks())

    def like_live(component: str) -> Any:
        device = next(live[component].parameters()).device
        found = getattr(pipeline, component).eval()
        return found if device.type == "meta" else found.to(device)

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


def _peft_reading(job: Job, give_back: Callable[[], None]) -> Reading:
    found: Deltas = {}
    dtype = job.dtype
    for component, network in job.networks():
        for name, layer in network.named_modules():
            if isinstance(layer, BaseTunerLayer) and ADAPTER in layer.active_adapters and _has(layer):
                place: Place = component, canonical(network, component, name)
                found[place] = partial(_merged_by_peft, layer)
                own = [p.dtype for n, p in layer.named_parameters() if not n.startswith("base_layer.")]
                dtype = min([dtype, *own], key=lambda held: held.itemsize)
                layer.float()
    give_back()
    return Reading(job.components, found, len(found), dtype)


def _has(layer: BaseTunerLayer) -> bool:
    return any(f".{ADAPTER}." in f".{name}." for name, _ in layer.named_parameters())


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
