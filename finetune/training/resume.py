"""Going on where a run stopped: find the newest checkpoint, refuse what does not belong together, put it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune.adapters.files import ADAPTER_FILE
from finetune.config import Run, differences
from finetune.data.dataset import dataset_changes
from finetune.errors import BusyError, CheckpointError
from finetune.run_files import make_run
from finetune.training.checkpoint import Found, latest_checkpoint
from finetune.training.loop import Loop
from finetune.training.optimizer_state import load_optimizer_state

COMPARED = {
    "base": "the base model", "optimizer_class": "the optimizer", "batch": "the batch",
    "own_code": "the file of your own function",
}  # fmt: skip
"""Documents of a checkpoint that must be what they are now."""


@dataclass(frozen=True)
class Resume:
    """What to do about a run that is in the folder already.

    Attributes:
        mode: "auto" goes on with it if it is the same run; "must" refuses to start anew; "never" refuses to go on.
        accept_data_change: go on although pictures or captions are not what they were.
        strict_numerics: refuse a machine that computes the last bits differently, instead of saying so.
    """

    mode: Literal["auto", "must", "never"] = "auto"
    accept_data_change: bool = False
    strict_numerics: bool = False


def find(run: Run, how: Resume) -> Found | None:
    """The newest valid checkpoint in the run's folder, or None for a fresh start.

    Raises:
        CheckpointError: if it was made by a run that this one cannot go on with, listing every difference; or if there
            is none and there must be one.
        BusyError: if there is one and there must not be.
    """
    found = latest_checkpoint(run.output_dir)
    if found is None:
        if how.mode == "must":
            raise CheckpointError(
                f"{run.output_dir} holds no checkpoint, and --resume must asks for one; name the folder of the run."
            )
        return None
    if how.mode == "never":
        raise BusyError(
            f"{run.output_dir} is used: it holds {found.path.name}.",
            ["choose another output_dir, or leave --resume never out to go on with that run."],
        )
    before = make_run(found.documents["run"], f"{found.path.name}/run.json")
    # keep: what must stay is the batch over all processes; `restore` compares that.
    before = before.model_copy(
        update={"train": before.train.model_copy(update={"batch_size": run.train.batch_size})}
    )
    changed = differences(before, run)
    if changed:
        if any(line.startswith("train.steps ") for line in changed):
            changed.append(
                "to train longer: the curve of the learning rate was planned for these steps, so begin a run in "
                f"another output_dir with adapter.start_from={run.output_dir / ADAPTER_FILE}"
            )
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


def story(found: Found) -> list[str]:
    """What is wrong with newer checkpoints, and how much has to be done again."""
    if not found.skipped:
        return []
    newest = max(int(line.removeprefix("checkpoint-")[:6]) for line in found.skipped)
    again = newest - found.state.step
    return [
        *found.skipped,
        f"{found.path.name} is the newest whole one: {again} {'step is' if again == 1 else 'steps are'} done again.",
    ]


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
        advice = " (or give --accept-data-change)" if changes else ""
        raise CheckpointError(
            f"{found.path.name} cannot be continued, because what it was trained on has changed. Restore it{advice}, "
            "or choose another output_dir:",
            problems,
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{key} was {before[key]} and is now {now.get(key)}" for key in before if before[key] != now.get(key)]
