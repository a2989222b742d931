"""Going on where a run stopped: find the newest checkpoint, refuse what does not belong together, put it in place."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from finetune.adapters import AdapterSet
from finetune.config import Run, differences
from finetune.data.dataset import dataset_changes
from finetune.errors import CheckpointError
from finetune.run_files import make_run
from finetune.training.checkpoint import Found, TrainState, latest_checkpoint
from finetune.training.ema import Ema
from finetune.training.optimizers import BuiltOptimizer, load_optimizer_state


def find(run: Run) -> Found | None:
    """The newest valid checkpoint in the run's folder, or None for a fresh start.

    Raises:
        CheckpointError: if it was made by a run that this one cannot go on with, listing every difference.
    """
    found = latest_checkpoint(run.output_dir)
    if found is None:
        return None
    changed = differences(make_run(found.documents["run"], f"{found.path.name}/run.json"), run)
    if changed:
        raise CheckpointError(
            f"{run.output_dir} holds a checkpoint of another run. Set these back, or choose another output_dir:",
            changed,
        )
    if found.state.step > run.train.steps:
        raise CheckpointError(
            f"{run.output_dir} was trained for {found.state.step} steps already, train.steps is {run.train.steps}; "
            "choose another output_dir for a shorter run."
        )
    return found


def restore(
    found: Found, documents: dict[str, Any], adapters: AdapterSet, optimizer: BuiltOptimizer, ema: Ema | None,
    accelerator: Accelerator,
) -> TrainState:  # fmt: skip
    """Load weights, optimizer, running mean and scaler; where the run stands.

    Raises:
        CheckpointError: if the pictures, the base model or the optimizer are not what the checkpoint was made with.
    """
    problems = dataset_changes(found.documents["dataset"], documents["dataset"])
    for key, what in (("base", "the base model"), ("optimizer_class", "the optimizer"), ("batch", "the batch")):
        before, now = found.documents[key], documents[key]
        problems += [f"{what}: {k} was {before[k]} and is now {now[k]}" for k in before if before[k] != now.get(k)]
    if problems:
        raise CheckpointError(
            f"{found.path.name} cannot be continued, because what it was trained on has changed. Restore it, or choose "
            "another output_dir:",
            problems,
        )
    adapters.load(found.tensors["adapter"])
    names = {parameter: name for name, parameter in adapters.named_parameters().items()}
    load_optimizer_state(optimizer.optimizer, names, found.tensors["optimizer"], found.documents["optimizer"])
    if ema is not None:
        ema.load(found.tensors["ema"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(found.documents["scaler"])
    return found.state
