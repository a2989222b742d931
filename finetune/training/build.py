"""From a `Run` to devices and the objective; pictures and adapters have files of their own beside this one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from finetune.config import Run
from finetune.errors import ConfigError
from finetune.families import Components
from finetune.objectives import Objective, build_objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of number formats in configurations."""
_AUTOCAST = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(dtype: str, output_dir: Path, trackers: Sequence[str]) -> tuple[Accelerator, str]:
    """The accelerator for a run, and the number format that "auto" came to."""
    # keep: accelerate keeps its state for the whole process; a second run may need another precision.
    AcceleratorState._reset_state()
    resolved = _auto_dtype() if dtype == "auto" else dtype
    if resolved == "fp16" and not torch.cuda.is_available():
        raise ConfigError("model.dtype=fp16 needs a GPU: a CPU computes fp16 too coarsely to train; use fp32 or bf16.")
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.trackers names {', '.join(missing)}, which is not installed; install it (pip install "
            f"{' '.join(missing)}) or take it out: metrics.jsonl is always written."
        )
    accelerator = Accelerator(
        mixed_precision=_AUTOCAST[resolved],
        log_with=list(trackers) or None,
        project_dir=str(output_dir),
        # the others wait while the first process renders class pictures
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    return accelerator, resolved


def _auto_dtype() -> str:
    if not torch.cuda.is_available():
        return "fp32"
    # keep: without including_emulation=False a T4 claims bf16 and runs it in slow emulation.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


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
        weighting=asked.weighting,
        snr_gamma=asked.snr_gamma,
        loss=asked.loss,
        huber_delta=asked.huber_delta,
    )


def schedule_digest(components: Components) -> str:
    """One digest over the base's noise schedule: another prediction type is another objective."""
    return hashlib.sha256(json.dumps(components.scheduler_config, sort_keys=True, default=str).encode()).hexdigest()
