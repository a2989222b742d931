"""Read written files the way their users' programs do, into networks that can be compared with the live ones.

Readers never touch the live base: they get copies of its networks that share the weights, so no memory is
doubled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from finetune import storage
from finetune.export.adapter import kohya_prefix, shortened
from finetune.export.job import ExportError, Job
from finetune.export.merged import merged_tensors
from finetune.families.base import Components
from finetune.families.text import canonical
from finetune.sampling import build_pipeline

ADAPTER = "exported"
Deltas = dict[tuple[str, str], Tensor]
"""(component, canonical module) -> what is added to the layer's weight, scale included, in fp32."""


@dataclass
class Reading:
    """What a reader made of a file.

    Attributes:
        components: networks that behave as the reader's do.
        deltas: what the reader adds per module; None where the file holds sums that were compared bit by bit
            already.
        modules: how many layers the reader changed.
        dtype: narrowest number format in which the reader holds changes.
    """

    components: Components
    deltas: Deltas | None
    modules: int
    dtype: torch.dtype


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
    """By the rules of sd-scripts, A1111, ComfyUI and InvokeAI, none of whose code is used.

    A layer's key is the network's prefix and its dotted name with underscores; the change is
    alpha / rank * up @ down, a missing or zero alpha means alpha = rank, and a key without a layer is an
    error ("lora key not loaded").

    Source: sd-scripts networks/lora.py, stable-diffusion-webui extensions-builtin/Lora/networks.py.
    """
    components = shared_copies(job)
    tensors, _ = storage.read_safetensors(path)
    layers = {}
    for component, network in replace(job, components=components).networks():
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                module = canonical(network, component, name)
                key = f"{kohya_prefix(job, component)}_{module}".replace(".", "_")
                layers[key] = ((component, module), layer)
    unknown = sorted({name.split(".")[0] for name in tensors} - set(layers))
    if unknown:
        raise ExportError("Readers of kohya layout would not load these keys.", shortened(unknown))
    deltas: Deltas = {}
    for key in sorted({name.split(".")[0] for name in tensors}):
        up, down = tensors[f"{key}.lora_up.weight"].float(), tensors[f"{key}.lora_down.weight"].float()
        rank = down.shape[0]
        alpha = float(tensors.get(f"{key}.alpha", torch.tensor(0.0))) or rank
        owner, layer = layers[key]
        delta = torch.einsum("or,ri->oi", up.reshape(-1, rank), down.reshape(rank, -1)) * (alpha / rank)
        deltas[owner] = delta.reshape(layer.weight.shape)
        layer.register_forward_hook(_plus(deltas[owner].to(layer.weight.device)))
    return Reading(components, deltas, len(deltas), torch.float32)


def read_merged(job: Job, path: Path) -> Reading:
    """`DiffusionPipeline.from_pretrained`; every tensor must be bit for bit what was to be written."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
        str(path), torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    problems = []
    live = dict(job.networks())
    assert job.components.vae is not None
    for component, network in (*live.items(), ("vae", job.components.vae)):
        loaded = getattr(pipeline, component).state_dict()
        for name, tensor in merged_tensors(job, component, network).items():
            if name not in loaded or not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
                problems.append(f"{component}.{name} is {'different' if name in loaded else 'missing'}.")
    if problems:
        raise ExportError(f"{path.name} does not read back as it was written.", shortened(problems))

    def like_live(component: str) -> Any:
        parameter = next(live[component].parameters())
        loaded = getattr(pipeline, component).eval().to(parameter.device)
        return loaded if parameter.dtype == torch.float32 else loaded.to(parameter.dtype)

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
    return Reading(components, None, sum(1 for _ in job.file.modules()), job.dtype)


READERS: dict[str, Callable[[Job, Path], Reading]] = {
    "diffusers": read_diffusers,
    "kohya": read_kohya,
    "peft": read_peft,
    "pipeline": read_merged,
}
"""name -> how that kind of program reads a file."""


def shared_copies(job: Job) -> Components:
    """The networks once more, free to be changed in structure; their weights are the live ones."""
    components = job.components
    return replace(
        components,
        denoiser=_shared_copy(components.denoiser),
        text_encoders={name: _shared_copy(network) for name, network in components.text_encoders.items()},
    )


def _shared_copy(network: nn.Module) -> nn.Module:
    weights = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in weights})


def _peft_reading(job: Job, components: Components, adapter: str) -> Reading:
    deltas: Deltas = {}
    dtype = job.dtype
    for component, network in job.networks():
        for name, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                down: Any = layer.lora_A[adapter].weight
                up: Any = layer.lora_B[adapter].weight
                dtype = min(dtype, up.dtype, key=lambda held: held.itemsize)
                delta = (up.detach().float().flatten(1) @ down.detach().float().flatten(1)) * layer.scaling[
                    adapter
                ]
                module = canonical(network, component, name)
                deltas[component, module] = delta.reshape(up.shape[0], *down.shape[1:]).cpu()
    return Reading(components, deltas, len(deltas), dtype)


def _plus(delta: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        wide = inputs[0].to(delta.dtype)
        convolution = isinstance(layer, nn.Conv2d)
        change = layer._conv_forward(wide, delta, None) if convolution else functional.linear(wide, delta)
        return output + change.to(output.dtype)

    return add
