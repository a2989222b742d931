"""Step after step: draw, train, and do what is due after it. What is built for it stands in `Loop`.

    data/sampler.py     which pictures the step gets, and the number of each draw
    data/batch.py       Collator: their latents, captions, noise and quantiles, as batches
    training/step.py    noise the latents, ask the model, weigh the losses, move the parameters; in it
    objectives/         which noise level a quantile is, what the right answer is, what a wrong one costs
    training/meter.py   gathers what the step measured on the device, and reads it when a line is due
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from finetune.adapters import AdapterFile, AdapterSet
from finetune.config import Run
from finetune.data.batch import Batch, Collator
from finetune.data.sampler import Draw, Sampler
from finetune.errors import NumericError, StoppedOnRequest, first_few
from finetune.families import Components, ModelFamily
from finetune.objectives import Objective
from finetune.rng import seed_libraries
from finetune.tracking import Advance, MetricsLog, Reporter
from finetune.training.build_data import Pictures
from finetune.training.checkpoint import Contents, TrainState, save_checkpoint
from finetune.training.ema import Ema, Mean
from finetune.training.history import History
from finetune.training.lr_schedules import learning_rates
from finetune.training.meter import Meter
from finetune.training.optimizer_state import optimizer_state
from finetune.training.optimizers import BuiltOptimizer, set_learning_rate
from finetune.training.samples import SampleSheets
from finetune.training.signals import Agreement, Requests
from finetune.training.step import StepResult, training_step
from finetune.training.teacher import Teacher
from finetune.training.trackers import Trackers
from finetune.training.validation import BANDS, Ratio, Validator


@dataclass
class Loop:
    """What the loop works on; `state`, `validation`, `meter` and `history` change as it goes.

    Attributes:
        ema: the running mean, if the run keeps one.
        mean: what stands in for the parameters when they are judged, rendered and exported: `ema`, or the
            optimizer's own mean, or None.
        sheets: None in all but the first process.
        documents: what a checkpoint must match to be resumed.
        judged_on: what validation measures on, in words.
    """

    run: Run
    family: ModelFamily
    components: Components
    adapters: AdapterSet
    model: nn.Module
    objective: Objective
    optimizer: BuiltOptimizer
    ema: Ema | None
    mean: Mean | None
    teacher: Teacher | None
    sampler: Sampler
    collator: Collator
    validator: Validator | None
    sheets: SampleSheets | None
    accelerator: Accelerator
    reporter: Reporter
    documents: dict[str, Any]
    judged_on: str
    meter: Meter
    history: History
    pictures: Pictures
    state: TrainState = field(default_factory=lambda: TrainState(step=0, samples_seen=0, epoch=0, seconds=0.0))
    validation: Ratio | None = None
    trackers: Trackers = field(default_factory=lambda: Trackers((), Reporter()))

    def draws(self, step: int) -> list[list[Draw]]:
        """The pictures of optimizer step `step`, from 0, over all processes."""
        return self.sampler.step(step, self.run.train.gradient_accumulation_steps)

    def names(self, step: int) -> list[str]:
        """Their file names."""
        return self.collator.names([draw for draws in self.draws(step) for draw in draws])

    def stopped_early(self) -> bool:
        """Whether validation has not become better for as long as the run is patient."""
        patience = self.run.validation.patience
        return bool(patience) and self.history.stale() >= patience

    def adapter_file(self, mean: Mean | None) -> AdapterFile:
        """The adapter as it is now, or its mean, with its header."""
        run = self.run
        tensors = self.adapters.state()
        if mean is not None:
            tensors = {name: value.detach().float().cpu().clone() for name, value in mean.state().items()}
        return self.adapters.to_file(
            tensors,
            family=self.family.name,
            base=self.components.source,
            base_digest=self.components.digest,
            trigger_words=run.trigger_words(),
            run_digest=run.digest(),
            step=self.state.step,
        )


def run_loop(loop: Loop, requests: Requests) -> None:
    """Train until the last step, until validation is no longer better, or until a request or bad numbers stop it.

    Raises:
        StoppedOnRequest: after everything is saved.
        NumericError: naming the pictures; nothing of the bad step is saved.
    """
    run, accelerator = loop.run, loop.accelerator
    # keep: a run that begins anew writes its step 0 anew, so nothing of a start that was killed before may stay.
    kept = loop.state.step or -1
    log = MetricsLog(run.output_dir / "metrics.jsonl", kept) if accelerator.is_main_process else None
    if loop.validator and loop.state.step == 0:
        _record(loop, log, 0, validate(loop))
    rate_at = learning_rates(run.optimizer, run.train.steps)
    loop.model.train()
    agreement = Agreement(requests, accelerator.num_processes, is_main_process=accelerator.is_main_process)
    requests.listening = True
    before, started = loop.state.seconds, time.perf_counter()
    loop.meter.start()
    with loop.reporter.progress("Training", run.train.steps, loop.state.step) as advance:
        for step in range(loop.state.step, run.train.steps):
            if loop.stopped_early():
                break
            loop.meter.add(step, *one_step(loop, step, rate_at(step)))
            loop.state = _moved_on(loop, step, before + time.perf_counter() - started)
            stopping, saving = agreement.after_step()
            _after_step(loop, log, advance, rate_at(step), stopping=stopping, saving=saving)
            if stopping:
                why = requests.stop or "another process was asked"
                raise StoppedOnRequest(
                    f"Stopped after step {step + 1} of {run.train.steps} ({why}); everything is saved. "
                    "The same command goes on from here."
                )


def one_step(loop: Loop, step: int, rate: float) -> tuple[StepResult, list[Batch]]:
    """Draw the pictures of a step and train on them; what it measured, and this process's batches, on the CPU."""
    run, accelerator = loop.run, loop.accelerator
    set_learning_rate(loop.optimizer.optimizer, rate)
    batches = loop.collator.step(step, loop.draws(step), accelerator.process_index, accelerator.num_processes)
    seed_libraries(run.train.seed, step, accelerator.process_index)
    moving = loop.adapters.moving(step, run.train.steps, keep_graph=accelerator.num_processes > 1)
    result = training_step(
        loop.model, loop.objective, [batch.to(accelerator.device) for batch in batches],
        moving, loop.optimizer.optimizer, accelerator, run.optimizer.max_grad_norm,
        loop.teacher.question(step) if loop.teacher else None,
    )  # fmt: skip
    loop.adapters.after_step(moving)
    if loop.ema:
        loop.ema.update(step + 1)
    return result, batches


def _moved_on(loop: Loop, step: int, seconds: float) -> TrainState:
    return TrainState(
        step=step + 1,
        samples_seen=loop.state.samples_seen + sum(len(draws) for draws in loop.draws(step)),
        epoch=loop.sampler.epoch_of((step + 1) * loop.run.train.gradient_accumulation_steps),
        seconds=seconds,
    )


def _after_step(
    loop: Loop, log: MetricsLog | None, advance: Advance, rate: float, *, stopping: bool, saving: bool
) -> None:
    """Log, validate, save and render where they are due after the step that `loop.state` counts.

    Whatever is saved was judged before, so that a run that goes on from there judges as if it had never stopped.
    """
    run, step = loop.run, loop.state.step
    last = step == run.train.steps or stopping

    def due(every: int) -> bool:
        return bool(every) and (last or step % every == 0)

    best = False
    if saving or due(run.train.log_every) or due(run.checkpoint.every) or due(run.validation.every):
        reading = loop.meter.read(loop.names)
        for warning in reading.warnings:
            loop.reporter.warn(warning)
        values: dict[str, Any] = {**reading.values, **_rates(loop, rate)}
        values["epoch"] = loop.state.epoch
        if loop.validator and due(run.validation.every) and not stopping:
            values |= validate(loop)
            assert loop.validation is not None, "just measured"
            best = loop.history.add(step, loop.validation)
        _record(loop, log, step, values)
        loop.meter.detail = _detail(loop, reading.values)
    advance(step, loop.meter.detail)
    if saving or due(run.checkpoint.every) or (best and run.checkpoint.keep_best) or loop.stopped_early():
        save(loop)
        if saving and not stopping:
            loop.reporter.note(f"Saved after step {step}, as asked.")
    if run.samples.every and step % run.samples.every == 0 and not last:
        with loop.mean.swapped() if loop.mean else nullcontext():
            show_sheet(loop, step)


def show_sheet(loop: Loop, step: int) -> None:
    """Render the sheet of `step`, in the first process and if there are prompts, and give it to the trackers."""
    if loop.sheets:
        loop.trackers.show(step, loop.sheets.render(step, loop.reporter))


def _rates(loop: Loop, factor: float) -> dict[str, float]:
    """The learning rate of the first that is trained; where others have another, of each; their lowest."""
    lowest = {what: factor * rates[0] for what, rates in loop.adapters.rates().items()}
    each = {f"learning_rate/{what}": rate for what, rate in lowest.items()} if len(set(lowest.values())) > 1 else {}
    return {"learning_rate": next(iter(lowest.values())), **each}


def _detail(loop: Loop, values: dict[str, float]) -> str:
    ratio = "" if loop.validation is None else f"  val/base {loop.validation.value:.3f}"
    return f"loss {values['loss']:.4f}{ratio}" if "loss" in values else f"loss not finite{ratio}"


def validate(loop: Loop) -> dict[str, Any]:
    """Measure the ratio to the base; what goes into the log."""
    assert loop.validator is not None, "called only when validation is on"
    with loop.mean.swapped() if loop.mean else nullcontext():
        ratio = loop.validator.measure(loop.model, loop.adapters, loop.accelerator)
    if loop.accelerator.num_processes > 1:
        # keep: a last bit that differs between processes could end the run in one of them only.
        ratio = broadcast_object_list([ratio], from_process=0)[0]
    loop.validation = ratio
    bands = {f"validation/{band}": value for band, value in zip(BANDS, ratio.bands, strict=False)}
    error = {} if ratio.error is None else {"validation/error": ratio.error}
    plain = {} if ratio.plain is None else {"validation/plain_ratio": ratio.plain}
    return {"validation/loss": ratio.loss, "validation/ratio": ratio.value, **error, **plain, **bands}


def _record(loop: Loop, log: MetricsLog | None, step: int, values: dict[str, Any]) -> None:
    if log is not None:
        log.write(step, values)
    loop.trackers.log(step, values)


def require_finite(step: int, *parts: Mapping[str, Tensor]) -> None:
    """Refuse to save numbers that nothing can go on from.

    Raises:
        NumericError: naming the tensors.
    """
    broken = [name for part in parts for name, tensor in part.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise NumericError(
            f"The weights are no longer finite after step {step}, though every gradient was: the optimizer made them "
            "so. Nothing of it is saved; checkpoints hold the last good state.",
            [*first_few(broken), "lower optimizer.learning_rate, take another optimizer, or model.dtype=fp32"],
        )


def save(loop: Loop) -> None:
    """Write a checkpoint; only the main process does."""
    if not loop.accelerator.is_main_process:
        return
    run = loop.run
    tensors, scalars = optimizer_state(
        loop.optimizer.optimizer, {p: name for name, p in loop.adapters.named_parameters().items()}
    )
    files: dict[str, Contents] = {"adapter": loop.adapter_file(None), "optimizer": tensors}
    if loop.mean:
        files["ema"] = loop.adapter_file(loop.mean)
    require_finite(loop.state.step, *(file.tensors for file in files.values() if isinstance(file, AdapterFile)))
    documents = loop.documents | {
        "optimizer": scalars, "validation": loop.history.document(), "meter": loop.meter.document()
    }  # fmt: skip
    if loop.accelerator.scaler is not None:
        documents["scaler"] = loop.accelerator.scaler.state_dict()
    best = loop.history.best() if run.checkpoint.keep_best else None
    save_checkpoint(
        run.output_dir, loop.state, files, documents, run.checkpoint.keep,
        spare=lambda step: step == (best.step if best else None)
        or (bool(run.checkpoint.keep_every) and step % run.checkpoint.keep_every == 0),
    )  # fmt: skip
