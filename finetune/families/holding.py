"""How the frozen denoiser's weights are held: as they compute, in fewer bits that are unpacked layer by layer, or away
from the accelerator, visiting it layer by layer.

Adapters work on all of them: PEFT knows bitsandbytes' layers, and all others are linear and convolution layers.
The trained adapter itself always stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune.errors import ConfigError, nearest
from finetune.families.frozen import can_be_held, held_in_fp8, held_in_int8, held_on_host

KEPT = ("embed", "proj_in", "time_emb_proj", "norm_out", "conv_in", "conv_out")
"""Parts of names whose layers are delicate and are never rounded."""
KEPT_IF_SMALL = ("norm", "proj_out")
"""The same for layers with fewer than LARGE weights. In Flux such layers hold five of its twelve billion."""
LARGE = 2**23
BLOCK = 64
"""Numbers that nf4 scales together; layers whose rows are no multiple of it stay as they are. Real ones all are."""


def hold(denoiser: nn.Module, storage: str, dtype: torch.dtype) -> nn.Module:
    """The denoiser with its weights held as asked; they still compute in `dtype`.

    Raises:
        ConfigError: for a name that is not in STORAGE, or one that this machine cannot train with.
    """
    if storage not in STORAGE:
        known = f"{nearest(storage, STORAGE)}; one of {', '.join(STORAGE)}"
        raise ConfigError(f"model.storage={storage} is not known{known}.")
    STORAGE[storage](denoiser, dtype)
    return denoiser


def _full(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """As they compute: 2 bytes per weight in bf16 or fp16."""


def _fp8(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """One byte per weight, unpacked for each layer's moment of use. Runs everywhere; rounds weights to 3 bits."""
    _in_one_byte(denoiser, lambda layer: held_in_fp8(layer, dtype))


def _host(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """All their bits, in main memory; every pass fetches each layer's weight for its moment of use."""
    for layer in denoiser.modules():
        if can_be_held(layer):
            held_on_host(layer, dtype)


def _int8(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """One byte per weight, finer than fp8: a row's numbers are whole ones. Runs everywhere."""
    _in_one_byte(denoiser, lambda layer: held_in_int8(layer, dtype))


def _nf4(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Half a byte per weight of linear layers. Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314."""
    _replace(denoiser, lambda layer: _four_bit(layer, dtype))


STORAGE: dict[str, Callable[[nn.Module, torch.dtype], None]] = {
    "full": _full, "fp8": _fp8, "int8": _int8, "nf4": _nf4, "host": _host,
}  # fmt: skip
"""name -> what makes a denoiser hold its weights that way, in place."""


def _in_one_byte(denoiser: nn.Module, held: Callable[[nn.Module], None]) -> None:
    for path, layer in denoiser.named_modules():
        if can_be_held(layer) and not _is_kept(path, layer):
            held(layer)


def _is_kept(path: str, layer: nn.Module) -> bool:
    weight: Any = layer.weight
    small = weight.numel() < LARGE
    return any(part in path for part in KEPT) or (small and any(part in path for part in KEPT_IF_SMALL))


def _replace(root: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    """Put another layer in the place of every large linear layer whose rows fill whole blocks."""
    for path, layer in list(root.named_modules()):
        if not isinstance(layer, nn.Linear) or _is_kept(path, layer):
            continue
        if layer.in_features % BLOCK == 0:
            parent, _, name = path.rpartition(".")
            setattr(root.get_submodule(parent), name, made(layer))


def _four_bit(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes  # noqa: PLC0415 - takes seconds, and few runs need it

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    # keep: on CPUs with bf16 instructions it would pack its weight anew for inference at the first validation, in a
    # layout without a backward pass.
    made.support_avx512bf16_for_cpu = False
    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    # keep: packing happens in the move to a device, even to the one where the weight already is. A GPU packs Flux in
    # seconds, one core of a CPU in seven minutes.
    home = layer.weight.device
    made.weight = weight.to("cuda" if torch.cuda.is_available() else home).to(home)
    made.bias = layer.bias
    return made
