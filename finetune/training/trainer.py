"""The trainer: everything is built, then the loop runs. One trainer for every family, adapter and objective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune.adapters import AdapterFile, AdapterSet
from finetune.adapters.files import ADAPTER_FILE
from finetune.config import Run
from finetune.data.batch import Collator
from finetune.data.dataset import fingerprint
from finetune.data.sampler import Sampler
from finetune.errors import NumericError, ResourceError, StoppedOnRequest
from finetune.families import Components, ModelFamily, load_family
from finetune.objectives import Objective
from finetune.rng import seed_libraries
from finetune.run_files import dump_run
from finetune.storage import disk_errors, write_json
from finetune.tracking import Advance, MetricsLog, Reporter
from finetune.training import build, build_adapters, build_data, plan, resume
from finetune.training.checkpoint import TrainState, save_checkpoint
from finetune.training.ema import Ema
from finetune.training.lock import hold
from finetune.training.lr_schedules import LR_SCHEDULES
from finetune.training.model import TrainableModel, enable_gradient_checkpointing
from finetune.training.optimizers import BuiltOptimizer, build_optimizer, optimizer_state, set_learning_rate
from finetune.training.samples import SampleSheets
from finetune.training.signals import StopRequest, stop_on_signal
from finetune.training.step import StepResult, training_step
from finetune.training.validation import BANDS, Ratio, Validator


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind.

    Attributes:
        output_dir: the run folder.
        adapter: the finished adapter, ready for `finetune.export`.
        steps: optimizer steps in all.
        seconds: time spent in the loop, over all resumed parts.
        validation: the last ratio to the base model, or None when validation is off.
        judged_on: what it was measured on, in words: held-out pictures, or a probe of the training pictures.
        family: what the base is.
        components: the base with the adapters attached and idle, on the CPU.
        adapters: the live adapters.
        is_main_process: False in all but the first of several processes; only the first writes.
    """

    output_dir: Path
    adapter: AdapterFile
    steps: int
    seconds: float
    validation: Ratio | None
    judged_on: str
    family: ModelFamily
    components: Components
    adapters: AdapterSet
    is_main_process: bool


@dataclass
class _Loop:
    """What the loop works on."""

    run: Run
    family: ModelFamily
    components: Components
    adapters: AdapterSet
    model: nn.Module
    objective: Objective
    optimizer: BuiltOptimizer
    ema: Ema | None
    sampler: Sampler
    collator: Collator
    validator: Validator | None
    sheets: SampleSheets | None
    accelerator: Accelerator
    reporter: Reporter
    state: TrainState
    documents: dict[str, Any]
    judged_on: str
    validation: Ratio | None = None


def is_main_process() -> bool:
    """Whether this is the only or the first process, by the variable that every launcher sets."""
    return os.environ.get("RANK", "0") == "0"


def train(run: Run, reporter: Reporter | None = None) -> TrainResult:
    """Train `run`, or go on with it where its output folder stopped.

    Raises:
        UserError: before the first step, for anything that is wrong with the run, its data or its base.
        StoppedOnRequest: after a checkpoint, when SIGINT or SIGTERM came.
        NumericError: when a loss or gradient is not finite; checkpoints hold the last good state.
    """
    # keep: of several processes only the first owns the folder; the others read it.
    owned = hold(run.output_dir) if is_main_process() else nullcontext()
    with owned, disk_errors(run.output_dir), _memory_errors(), stop_on_signal() as stop:
        loop = _prepare(run, (reporter if is_main_process() else None) or Reporter())
        if loop.sheets:
            with loop.adapters.disabled():
                loop.sheets.render(0, loop.reporter, only_if_missing=True)
        _loop(loop, stop)
        return _finish(loop)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """An accelerator that is full becomes words: what to change, and that nothing saved is lost."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "The accelerator's memory is full; checkpoints are intact, and the same command goes on from the last one.",
            [
                str(error).splitlines()[0],
                "lower train.batch_size and raise train.gradient_accumulation_steps by the same factor, set "
                "train.gradient_checkpointing=true, or lower data.resolution",
            ],
        ) from None


def _prepare(run: Run, reporter: Reporter) -> _Loop:
    """Build everything, say what will happen, and restore the newest checkpoint."""
    found = resume.find(run)
    # keep: "auto" means another format on another GPU; a resumed run keeps the one it began with.
    began = found.documents["base"]["dtype"] if found and run.model.dtype == "auto" else run.model.dtype
    accelerator, dtype = build.build_accelerator(began, run.output_dir, run.train.trackers)
    device = accelerator.device
    with reporter.progress("Loading the base model", 1) as advance:
        family, components = load_family(
            run.model.base, dtype=build.DTYPES[dtype], revision=run.model.revision, variant=run.model.variant
        )
        advance(1, "")
    objective = build.build_run_objective(run, components).to(device)
    cut = build_data.build_cut(run.data, family, components)
    adapters = build_adapters.build_adapters(run, family, components)
    with accelerator.main_process_first():
        pictures = build_data.build_pictures(run.data, cut, run.validation.holdout, run.train.seed, reporter)
        if run.data.prior is not None:
            folder = run.data.prior.folder or run.output_dir / "class_images"
            pictures = build_data.add_class_pictures(
                pictures, run.data.prior, folder, cut, family, components, device, reporter
            )
        collator = build_data.build_collator(run, pictures, cut, family, components, device, reporter)
    trained_text = components.text_encoders if run.text_encoder_adapter is not None else {}
    if run.train.gradient_checkpointing:
        enable_gradient_checkpointing(components.denoiser, trained_text)
    model = accelerator.prepare(TrainableModel(family, components.denoiser, trained_text))
    optimizer = build_optimizer(
        run.optimizer.name, adapters.parameter_groups(), betas=run.optimizer.betas,
        weight_decay=run.optimizer.weight_decay, eps=run.optimizer.eps, device=device,
    )  # fmt: skip
    sampler = Sampler(
        [p.item() for p in pictures.training], run.train.batch_size * accelerator.num_processes, run.train.seed
    )
    probe = pictures.holdout or pictures.subject[:16]
    documents = {
        "run": dump_run(run),
        "dataset": fingerprint(pictures.training),
        "base": {"digest": components.digest, "schedule": build.schedule_digest(components), "dtype": dtype},
        "optimizer_class": {"resolved": optimizer.resolved},
        "batch": {"pictures per pass over all processes": run.train.batch_size * accelerator.num_processes},
    }
    loop = _Loop(
        run, family, components, adapters, model, objective, optimizer,
        Ema(adapters.named_parameters(), run.train.ema_decay) if run.train.ema_decay else None,
        sampler, collator,
        Validator(probe, collator, objective, quantiles=run.validation.quantiles, seed=run.train.seed)
        if run.validation.every else None,
        SampleSheets(run.samples, family, components, adapters, cut.resolution, run.output_dir / "samples", device)
        if run.samples.prompts and accelerator.is_main_process else None,
        accelerator, reporter, TrainState(step=0, samples_seen=0, epoch=0, seconds=0.0), documents,
        f"{len(probe)} {'held-out' if pictures.holdout else 'training'} pictures",
    )  # fmt: skip
    rows = [("Base model", f"{components.source} ({family.name}), {dtype} on {device.type}")]
    rows += [*plan.data_rows(run, cut, pictures), *plan.adapter_rows(run, adapters)]
    reporter.table("Plan", [*rows, *plan.step_rows(run, sampler, accelerator.num_processes, optimizer)])
    plan.tell_problems(reporter, pictures)
    for note in optimizer.notes:
        reporter.warn(note)
    if found is not None:
        for line in found.skipped:
            reporter.warn(line)
        loop.state = resume.restore(found, documents, adapters, optimizer, loop.ema, accelerator)
        reporter.note(f"Going on after step {loop.state.step} of {run.train.steps}.")
    if accelerator.is_main_process:
        write_json(run.output_dir / "run.json", dump_run(run))
        write_json(run.output_dir / "dataset.json", documents["dataset"])
    return loop


def _loop(loop: _Loop, stop: StopRequest) -> None:
    """Step after step until the end, a stop request, or a loss that is not finite."""
    run, accelerator = loop.run, loop.accelerator
    factor = LR_SCHEDULES[run.optimizer.schedule]
    named = loop.adapters.named_parameters()
    log = MetricsLog(run.output_dir / "metrics.jsonl", loop.state.step) if accelerator.is_main_process else None
    accelerator.init_trackers("tracking", init_kwargs={"tensorboard": {"purge_step": loop.state.step + 1}})
    if loop.validator and loop.state.step == 0:
        _record(loop, log, 0, _validate(loop))
    meter = _Meter(accelerator)
    loop.model.train()
    stop.listening = True
    before, started = loop.state.seconds, time.perf_counter()
    steps = run.train.steps
    with loop.reporter.progress("Training", steps, loop.state.step) as advance:
        for step in range(loop.state.step, steps):
            rate = factor(step, steps, run.optimizer.warmup_steps)
            set_learning_rate(loop.optimizer.optimizer, rate)
            draws = loop.sampler.step(step, run.train.gradient_accumulation_steps)
            batches = loop.collator.step(step, draws, accelerator.process_index, accelerator.num_processes)
            seed_libraries(run.train.seed, step, accelerator.process_index)
            result = training_step(
                loop.model, loop.objective, [b.to(accelerator.device) for b in batches], named,
                loop.optimizer.optimizer, accelerator, run.optimizer.max_grad_norm,
            )  # fmt: skip
            if loop.ema:
                loop.ema.update(step + 1)
            meter.add(step, result)
            loop.state = TrainState(
                step=step + 1,
                samples_seen=loop.state.samples_seen + sum(len(d) for d in draws),
                epoch=loop.sampler.epoch_of((step + 1) * run.train.gradient_accumulation_steps),
                seconds=before + time.perf_counter() - started,
            )
            stopping = _agreed(stop, accelerator)
            _after_step(loop, log, meter, advance, rate, stopping=stopping)
            if stopping:
                raise StoppedOnRequest(
                    f"Stopped on request after step {step + 1} of {steps}; everything is saved. "
                    "The same command goes on from here."
                )


def _after_step(
    loop: _Loop, log: MetricsLog | None, meter: _Meter, advance: Advance, rate: float, *, stopping: bool
) -> None:
    """Log, validate, render and save where they are due after the step that `loop.state` counts."""
    run, step = loop.run, loop.state.step
    last = step == run.train.steps or stopping

    def due(every: int) -> bool:
        return bool(every) and (last or step % every == 0)

    if due(run.train.log_every) or due(run.checkpoint.every) or due(run.validation.every):
        values = meter.read(loop.sampler, loop.collator, run.train.gradient_accumulation_steps)
        values["learning_rate"] = rate * run.optimizer.learning_rate
        values["epoch"] = loop.state.epoch
        if loop.validator and due(run.validation.every) and not stopping:
            values |= _validate(loop)
        _record(loop, log, step, values)
        ratio = "" if loop.validation is None else f"  val/base {loop.validation.value:.3f}"
        meter.detail = f"loss {values['loss']:.4f}{ratio}"
    advance(step, meter.detail)
    if due(run.checkpoint.every):
        _save(loop)
    if loop.sheets and run.samples.every and step % run.samples.every == 0 and not last:
        with loop.ema.swapped() if loop.ema else nullcontext():
            loop.sheets.render(step, loop.reporter)


def _validate(loop: _Loop) -> dict[str, Any]:
    assert loop.validator is not None, "called only when validation is on"
    with loop.ema.swapped() if loop.ema else nullcontext():
        ratio = loop.validator.measure(loop.model, loop.adapters, loop.accelerator)
    loop.validation = ratio
    bands = {f"validation/{band}": value for band, value in zip(BANDS, ratio.bands, strict=False)}
    return {"validation/loss": ratio.loss, "validation/ratio": ratio.value, "validation/error": ratio.error, **bands}


def _record(loop: _Loop, log: MetricsLog | None, step: int, values: dict[str, Any]) -> None:
    if log is not None:
        log.write(step, values)
    loop.accelerator.log(values, step=step)


def _agreed(stop: StopRequest, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return stop.signal is not None
    asked = torch.tensor([float(stop.signal is not None)], device=accelerator.device)
    return bool(accelerator.reduce(asked, "sum").item())


def _save(loop: _Loop) -> None:
    """Write a checkpoint; only the main process does."""
    if not loop.accelerator.is_main_process:
        return
    tensors, scalars = optimizer_state(
        loop.optimizer.optimizer, {p: name for name, p in loop.adapters.named_parameters().items()}
    )
    files = {"adapter": loop.adapters.state(), "optimizer": tensors}
    if loop.ema:
        files["ema"] = loop.ema.state()
    documents = loop.documents | {"optimizer": scalars}
    if loop.accelerator.scaler is not None:
        documents["scaler"] = loop.accelerator.scaler.state_dict()
    save_checkpoint(loop.run.output_dir, loop.state, files, documents, loop.run.checkpoint.keep)


def _finish(loop: _Loop) -> TrainResult:
    """Write the finished adapter and the last sample sheet."""
    run = loop.run
    if loop.ema:
        loop.adapters.load(loop.ema.state())
    if loop.sheets:
        loop.sheets.render(run.train.steps, loop.reporter, only_if_missing=True)
    file = loop.adapters.to_file(
        loop.adapters.state(),
        family=loop.family.name,
        base=loop.components.source,
        base_digest=loop.components.digest,
        trigger_words=(run.data.trigger,) if run.data.trigger else (),
        run_digest=run.digest(),
        step=loop.state.step,
    )
    if loop.validator and loop.validation is None:
        _validate(loop)
    if loop.accelerator.is_main_process:
        file.save(run.output_dir / ADAPTER_FILE)
    loop.accelerator.end_training()
    for module in loop.components.modules().values():
        module.to("cpu").eval()
    return TrainResult(
        run.output_dir, file, loop.state.step, loop.state.seconds, loop.validation, loop.judged_on, loop.family,
        loop.components, loop.adapters, loop.accelerator.is_main_process,
    )  # fmt: skip


class _Meter:
    """Means over the steps since the last reading, kept on the device; knows the first step that was not finite."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.detail = ""
        self._accelerator = accelerator
        self._clear()

    def _clear(self) -> None:
        device = self._accelerator.device
        self._sums = torch.zeros(2, device=device)
        self._first_bad = torch.full((), -1, device=device)
        self._steps = 0
        self._started = time.perf_counter()

    def add(self, step: int, result: StepResult) -> None:
        """Take in one step's result without reading it."""
        self._sums += torch.stack([result.loss, result.grad_norm])
        self._first_bad = torch.where(~result.finite & (self._first_bad < 0), step, self._first_bad)
        self._steps += 1

    def read(self, sampler: Sampler, collator: Collator, accumulation: int) -> dict[str, Any]:
        """Means since the last reading.

        Raises:
            NumericError: naming the pictures of the first step whose loss or gradient was not finite.
        """
        bad = int(self._first_bad)
        if bad >= 0:
            names = collator.names([draw for draws in sampler.step(bad, accumulation) for draw in draws])
            raise NumericError(
                f"Step {bad + 1} gave a loss or gradient that is not finite; nothing of it was applied or saved.",
                [
                    f"its pictures were {', '.join(names)}",
                    "a lower optimizer.learning_rate or model.dtype=bf16 or fp32 usually helps; the same command goes "
                    "on from the last checkpoint",
                ],
            )
        seconds = (time.perf_counter() - self._started) / self._steps
        loss, norm = (self._accelerator.reduce(self._sums, "mean") / self._steps).tolist()
        self._clear()
        return {"loss": loss, "grad_norm": norm, "seconds_per_step": seconds}
