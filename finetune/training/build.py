"""From a `Run` to devices and the objective; pictures and adapters have files of their own beside this one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from finetune.config import Run
from finetune.errors import ConfigError
from finetune.families import Components
from finetune.objectives import NoiseShape, Objective, build_objective
from finetune.training import sharding
from finetune.training.trackers import missing

_AUTOCAST = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(dtype: str, trackers: Sequence[str]) -> tuple[Accelerator, str]:
    """The accelerator for a run, and the number format that "auto" came to.

    Raises:
        ConfigError: for a launcher, number format or tracker that cannot be used; all at once. Or if several processes
            were started that do not find each other, for each would train the whole run by itself.
    """
    # keep: accelerate keeps its state for the whole process; a second run may need another precision.
    AcceleratorState._reset_state()
    resolved = auto_dtype() if dtype == "auto" else dtype
    problems = [*_launcher_problems(), *missing(trackers)]
    if resolved == "fp16" and not torch.cuda.is_available():
        problems.append("model.dtype=fp16 needs a GPU: a CPU computes fp16 too coarsely to train; use fp32 or bf16.")
    if problems:
        raise ConfigError("The run cannot start:", problems)
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if sharding.asked_for():
        # keep: accelerate and transformers would split the adapters as well; `sharding` splits the base alone.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    accelerator = Accelerator(
        # keep: without a GPU accelerate joins processes only if it is told that they compute on CPUs.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        mixed_precision=_AUTOCAST[resolved],
        # the others wait while the first process renders class pictures
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if accelerator.num_processes < launched:
        raise ConfigError(
            f"{launched} processes were started, but accelerate sees {accelerator.num_processes}, so that each would "
            "train the whole run by itself; start one process, or `accelerate launch --multi_gpu --num_processes N`."
        )
    return accelerator, resolved


def launch_warnings() -> list[str]:
    """What the launcher did not do that it seems to have been asked for."""
    started = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    # keep: the launcher says where processes meet if it was asked for several, and on CPUs starts one nevertheless.
    asked = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if not asked or any(name in os.environ for name in started):
        return []
    return [
        "one process runs, though several seem to be wanted: `accelerate launch --cpu` starts several through MPI "
        "only; `accelerate launch --multi_gpu --num_processes N` starts them on CPUs too"
    ]


REFUSED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""What `accelerate launch` sets for ways of training that are refused."""


def _launcher_problems() -> list[str]:
    asked = [name for variable, name in REFUSED.items() if os.environ.get(variable, "").lower() in ("1", "true")]
    return [
        f"accelerate was configured for {name}, which joins what is trained into nameless pieces, one per process, so "
        "that no checkpoint could be resumed to the bit or by another number of processes; and what is trained here is "
        "small. Run `accelerate launch --multi_gpu ...` (DDP), or, where the frozen base does not fit on each GPU, "
        "`accelerate launch --use_fsdp --fsdp_version 2 ...` (FSDP2), which splits it as ZeRO-3 would."
        for name in asked
    ]


def emulated(dtype: str) -> list[str]:
    """What is wrong with a number format that this GPU only emulates; nothing for one that it computes in."""
    if dtype != "bf16" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return []
    return [
        f"model.dtype=bf16 on a {torch.cuda.get_device_name()}, which does not compute in it: torch emulates it, many "
        "times slower than fp16"
    ]


def auto_dtype() -> str:
    """What "auto" means here: bf16 where the GPU computes in it, fp16 on older GPUs, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return "fp32"
    # keep: without including_emulation=False a T4 claims bf16 and runs it in slow emulation.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def noise_shape(run: Run) -> NoiseShape:
    """What the training's noise looks like."""
    asked = run.objective
    return NoiseShape(asked.noise_offset, asked.pyramid_noise, asked.input_perturbation)


def build_run_objective(run: Run, components: Components) -> Objective:
    """The objective on the base's own noise schedule."""
    asked = run.objective
    return build_objective(
        components.scheduler_config,
        prediction=asked.prediction,
        density=asked.density,
        density_mean=asked.density_mean,
        density_std=asked.density_std,
        density_scale=asked.density_scale,
        density_alpha=asked.density_alpha,
        density_beta=asked.density_beta,
        density_shift=asked.density_shift,
        noise_range=asked.noise_range,
        weighting=asked.weighting,
        snr_gamma=asked.snr_gamma,
        p2_gamma=asked.p2_gamma,
        p2_k=asked.p2_k,
        loss=asked.loss,
        huber_delta=asked.huber_delta,
        huber_schedule=asked.huber_schedule,
        noise=noise_shape(run),
    )


def schedule_digest(components: Components) -> str:
    """One digest over the base's noise schedule: another prediction type is another objective."""
    return hashlib.sha256(json.dumps(components.scheduler_config, sort_keys=True, default=str).encode()).hexdigest()


def numerics(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a sum: a run goes on to the bit where this is the same."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
