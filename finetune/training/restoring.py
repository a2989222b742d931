"""A checkpoint put in place: weights, optimizer and history, once all of it is what the run was made with."""

from __future__ import annotations

from typing import Any

from finetune.data.dataset import dataset_changes
from finetune.errors import CheckpointError
from finetune.training.checkpoint import Found
from finetune.training.loop import Loop
from finetune.training.optimizer_state import load_optimizer_state
from finetune.training.resume import Resume

COMPARED = {
    "base": "the base model", "optimizer_class": "the optimizer", "batch": "the batch",
    "own_code": "your own code",
}  # fmt: skip
"""Documents of a checkpoint that must be what they are now."""


def restore(found: Found, loop: Loop, how: Resume) -> None:
    """Load weights, optimizer, running mean, scaler and history into `loop`, and set it to where the run stands.

    Raises:
        CheckpointError: if the pictures, the base model or the optimizer are not what the checkpoint was made with.
    """
    _check(found, loop, how)
    loop.adapters.load(found.tensors["adapter"])
    names = {parameter: name for name, parameter in loop.adapters.named_parameters().items()}
    load_optimizer_state(loop.optimizer.optimizer, names, found.tensors["optimizer"], found.documents["optimizer"])
    if loop.ema is not None:
        loop.ema.load(loop.adapters.trained(found.tensors["ema"]))
    if loop.accelerator.scaler is not None:
        loop.accelerator.scaler.load_state_dict(found.documents["scaler"])
    loop.history.load(found.documents.get("validation", {}), found.state.step)
    loop.meter.load(found.documents.get("meter", {}))
    loop.state = found.state


def _check(found: Found, loop: Loop, how: Resume) -> None:
    documents = loop.documents
    changes = dataset_changes(found.documents["dataset"], documents["dataset"])
    if "held_out" in found.documents:
        held_out = dataset_changes(found.documents["held_out"], documents["held_out"])
        changes += [f"held out: {line}" for line in held_out]
    if changes and how.accept_data_change:
        loop.reporter.warn(f"The pictures have changed, as accepted: {'; '.join(changes)}")
        changes = []
    problems = list(changes)
    for key, what in COMPARED.items():
        problems += [f"{what}: {line}" for line in _changed(found.documents.get(key, {}), documents[key])]
    other = _changed(found.documents.get("numerics", {}), documents["numerics"])
    if other and how.strict_numerics:
        problems += [f"the numerics: {line}" for line in other]
    elif other:
        loop.reporter.warn(
            f"The machine computes the last bits differently: {'; '.join(other)}. The run goes on, but not to the bit."
        )
    if problems:
        advice = " (or give --accept-data-change, in Python Resume(accept_data_change=True))" if changes else ""
        raise CheckpointError(
            f"{found.path.name} cannot be continued, because what it was trained on has changed. Restore it{advice}, "
            "or choose another output_dir:",
            problems,
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{key} was {before[key]} and is now {now.get(key)}" for key in before if before[key] != now.get(key)]
