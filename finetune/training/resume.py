"""Going on where a run stopped: find the newest checkpoint, and refuse what does not belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from data_tools.errors import counted
from finetune.config import Run, differences
from finetune.errors import BusyError, CheckpointError
from finetune.run_files import ADAPTER_FILE, make_run
from finetune.training.checkpoint import Found, latest_checkpoint, newest_run

Mode = Literal["auto", "must", "never"]


@dataclass(frozen=True)
class Resume:
    """What to do about a run that is in the folder already.

    Attributes:
        mode: "auto" goes on with it if it is the same run; "must" refuses to start anew; "never" refuses to go on.
        accept_data_change: go on although pictures or captions are not what they were.
        strict_numerics: refuse a machine that computes the last bits differently, instead of saying so.
    """

    mode: Mode = "auto"
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
    _refuse_mode(run, how, found.path.name if found else None)
    if found is None:
        return None
    refuse_other(found.path.name, found.documents["run"], run)
    if found.state.step > run.train.steps:
        raise CheckpointError(
            f"{run.output_dir} was trained for {counted(found.state.step, 'step')} already, train.steps is "
            f"{run.train.steps}; choose another output_dir for a shorter run."
        )
    return found


def check(run: Run, how: Resume) -> None:
    """Refuse what `find` will, as far as the names and the newest run.json tell: quick, and nothing is proved.

    Raises:
        CheckpointError, BusyError: see `find`.
    """
    newest = newest_run(run.output_dir)
    if newest is not None:
        _refuse_mode(run, how, newest[0])
        refuse_other(*newest, run)
    elif not any(run.output_dir.glob("checkpoint-*")):
        _refuse_mode(run, how, None)


def _refuse_mode(run: Run, how: Resume, newest: str | None) -> None:
    if newest is None and how.mode == "must":
        raise CheckpointError(
            f"{run.output_dir} holds no checkpoint, and --resume must asks for one; name the folder of the run."
        )
    if newest is not None and how.mode == "never":
        raise BusyError(
            f"{run.output_dir} is used: it holds {newest}.",
            ["choose another output_dir, or leave --resume never out to go on with that run."],
        )


def refuse_other(name: str, document: dict[str, Any], run: Run) -> None:
    """Refuse to go on with a checkpoint of another run.

    Args:
        name: of the checkpoint.
        document: its run.json.

    Raises:
        CheckpointError: listing every difference.
    """
    before = make_run(document, f"{name}/run.json")
    # keep: what must stay is the batch over all processes; `restore` compares that.
    before = before.model_copy(
        update={"train": before.train.model_copy(update={"batch_size": run.train.batch_size})}
    )
    changed = differences(before, run)
    if changed:
        if run.train.steps > before.train.steps and any(line.startswith("train.steps ") for line in changed):
            finished = run.output_dir / ADAPTER_FILE
            first = "" if finished.is_file() else "finish this run as it is, then "
            changed.append(
                f"to train longer: the curve of the learning rate was planned for these steps, so {first}begin a run "
                f"in another output_dir with adapter.start_from={finished}"
            )
        raise CheckpointError(
            f"{run.output_dir} holds a checkpoint of another run. Set these back, or choose another output_dir:",
            changed,
        )


def story(found: Found) -> list[str]:
    """What is wrong with newer checkpoints, and how much has to be done again."""
    if not found.skipped:
        return []
    newest = max(int(line.removeprefix("checkpoint-")[:6]) for line in found.skipped)
    again = newest - found.state.step
    return [
        *found.skipped,
        f"{found.path.name} is the newest whole one: {counted(again, 'step is', 'steps are')} done again.",
    ]
