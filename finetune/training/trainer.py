"""The trainer: everything is built, then the loop runs. One trainer for every family, adapter and objective."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from finetune.adapters import AdapterFile, AdapterSet
from finetune.config import Run
from finetune.devices import out_of_memory
from finetune.errors import ResourceError, StoppedOnRequest
from finetune.families import Components, ModelFamily
from finetune.run_files import ADAPTER_FILE
from finetune.storage import disk_errors
from finetune.tracking import Reporter
from finetune.training import preflight, setup
from finetune.training.lock import hold
from finetune.training.loop import Loop, require_finite, run_loop, show_sheet, validate
from finetune.training.resume import Resume
from finetune.training.signals import Requests, leave_together, requests_from_signals
from finetune.training.trackers import start_trackers
from finetune.training.validation import Ratio


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind.

    Attributes:
        output_dir: the run folder.
        adapter: the finished adapter, ready for `finetune.export`.
        steps: optimizer steps in all; fewer than train.steps if validation stopped the run early.
        seconds: time spent in the loop, over all resumed parts.
        validation: the last ratio to the base model, or None when validation is off.
        judged_on: what it was measured on, in words: held-out pictures, or a probe of the training pictures.
        family: what the base is.
        components: the base with the adapters attached and switched on, on the CPU; after FSDP, a piece of it.
        adapters: the live adapters.
        is_main_process: False in all but the first of several processes; only the first writes.
    """

    output_dir: Path
    adapter: AdapterFile = field(repr=False)
    steps: int
    seconds: float
    validation: Ratio | None
    judged_on: str
    family: ModelFamily
    components: Components = field(repr=False)
    adapters: AdapterSet = field(repr=False)
    is_main_process: bool

    def let_go(self) -> None:
        """Free the weights of the base and the live adapters, so that who loads the base again holds one, not two."""
        self.components.let_go()


def is_main_process() -> bool:
    """Whether this is the only or the first process, by the variable that every launcher sets."""
    return os.environ.get("RANK", "0") == "0"


def train(run: Run, reporter: Reporter | None = None, how: Resume | None = None) -> TrainResult:
    """Train `run`, or go on with it where its output folder stopped.

    Args:
        how: what to do about a run that is there already; None: go on with it if it is the same.

    Raises:
        UserError: before the first step, for anything that is wrong with the run, its data or its base.
        StoppedOnRequest: after a checkpoint, when a signal, a file or the clock asked for it.
        NumericError: when a loss or gradient is not finite; checkpoints hold the last good state.
    """
    requests = Requests(
        run.output_dir, run.train.max_hours, launched="WORLD_SIZE" in os.environ, speaking=is_main_process()
    )
    # keep: of several processes only the first owns the folder; the others read it.
    owned = hold(run.output_dir) if is_main_process() else nullcontext()
    with owned, disk_errors(run.output_dir), _memory_errors(), requests_from_signals(requests):
        if is_main_process():
            preflight.sweep(run.output_dir)
            requests.sweep()
        preflight.check(run)
        loop = setup.prepare(run, (reporter if is_main_process() else None) or Reporter(), how or Resume())
        if loop.accelerator.is_main_process:
            loop.trackers = start_trackers(run, loop.state.step, loop.reporter)
        try:
            if loop.sheets:
                loop.sheets.forget(loop.state.step)
            with loop.adapters.disabled():
                show_sheet(loop, 0)
            run_loop(loop, requests)
            return _finish(loop)
        except StoppedOnRequest:
            loop.trackers.finish()
            leave_together(loop.accelerator.wait_for_everyone, is_main_process=loop.accelerator.is_main_process)
            raise
        finally:
            loop.trackers.finish()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """An accelerator that is full becomes words: what to change, and that nothing saved is lost."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "The accelerator's memory is full; checkpoints are intact, and the same command goes on from the last one.",
            [
                str(error).splitlines()[0] if str(error) else "out of memory",
                "lower train.batch_size and raise train.gradient_accumulation_steps by the same factor, set "
                "train.gradient_checkpointing=true, or lower data.resolution; `finetune plan` predicts what fits",
            ],
        ) from None


def _finish(loop: Loop) -> TrainResult:
    """Write the finished adapter and the last sample sheet."""
    run = loop.run
    if loop.state.step < run.train.steps:
        best = loop.history.best()
        loop.reporter.note(
            f"Stopped early after step {loop.state.step}: no better validation than {best.value:.3f} after step "
            f"{best.step} in {loop.history.stale()} validations." if best else ""
        )
    if loop.mean:
        loop.adapters.load(loop.adapter_file(loop.mean).tensors)
    show_sheet(loop, loop.state.step)
    file = loop.adapter_file(None)
    require_finite(loop.state.step, file.tensors)
    if loop.validator and loop.validation is None:
        loop.mean = None  # its values are in place now
        validate(loop)
    if loop.accelerator.is_main_process:
        file.save(run.output_dir / ADAPTER_FILE)
    loop.accelerator.end_training()
    for module in loop.components.modules().values():
        module.to("cpu").eval()
    return TrainResult(
        run.output_dir, file, loop.state.step, loop.state.seconds, loop.validation, loop.judged_on, loop.family,
        loop.components, loop.adapters, loop.accelerator.is_main_process,
    )  # fmt: skip
