"""The frozen base in pieces, one per process, gathered block by block while it computes; the adapters whole in each.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. torch's FSDP2 splits the base only; gradients of the
adapters are averaged by DDP as without it. So all that a checkpoint holds exists whole under its own name in every
process: a run may go on with pieces or without, in any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from finetune.config import Run

VERSION = "FSDP_VERSION"
"""Set by accelerate's launcher where FSDP is asked for."""


def asked_for() -> bool:
    """Whether the launcher was asked to split the base over the processes."""
    return VERSION in os.environ or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def problems(run: Run) -> list[str]:
    """What of this run cannot be had with a base in pieces."""
    if not asked_for():
        return []
    found = []
    version = os.environ.get(VERSION, "1")
    if version != "2":
        found.append(
            f"accelerate was configured for FSDP version {version}, which joins weights of many layers into one; use "
            "--fsdp_version 2"
        )
    if run.model.storage != "full":
        found.append(
            f"model.storage={run.model.storage} with FSDP: packed weights cannot be split; set model.storage=full, or "
            "launch with --multi_gpu"
        )
    if run.samples.prompts:
        found.append(
            "samples.prompts with FSDP: one process alone cannot draw with a base in pieces; set samples.prompts=[] "
            f'and draw afterwards with `finetune sample "PROMPT" --run {run.output_dir}`'
        )
    return found


def split_base(model: nn.Module, whole: Collection[Tensor], device: torch.device) -> int:
    """Split the parameters of `model` over all processes, in place, before it is given to DDP.

    Args:
        whole: parameters that stay whole in every process.
        device: where the pieces lie, and where blocks are gathered.

    Returns:
        bytes of this process's piece.

    Source: torch.distributed.fsdp.fully_shard; what it leaves out, DDP takes.
    """
    kept = {id(tensor) for tensor in whole}
    ignored = {parameter for parameter in model.parameters() if id(parameter) in kept}
    split = [name for name, parameter in model.named_parameters() if id(parameter) not in kept]
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in [*_blocks(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, split)
    return sum(piece.to_local().nbytes for piece in model.parameters() if isinstance(piece, DTensor))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks that their own library calls indivisible, inner ones first: each is gathered by itself."""
    kinds = {kind for part in model.modules() for kind in getattr(part, "_no_split_modules", None) or ()}
    for part in reversed(list(model.modules())):
        if type(part).__name__ in kinds:
            yield part
