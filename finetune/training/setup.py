"""Everything the loop works on, built in the order in which it can fail cheaply, said as a plan, and put where it
stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from data_tools.errors import counted
from finetune.adapters import AdapterSet
from finetune.config import Run
from finetune.data.dataset import Cut, fingerprint
from finetune.data.sampler import Sampler
from finetune.dtypes import DTYPES
from finetune.errors import ConfigError
from finetune.families import Components, ModelFamily, load_model
from finetune.interchange.live import architecture_of
from finetune.objectives import Objective
from finetune.run_files import run_record
from finetune.storage import write_json
from finetune.tracking import Reporter, Rows
from finetune.training import build, build_adapters, build_data, plan, preflight, restoring, resume, sharding
from finetune.training.build_data import Pictures
from finetune.training.ema import Ema, Mean, ScheduleFreeMean
from finetune.training.history import History
from finetune.training.loop import Loop
from finetune.training.meter import Meter, Policy
from finetune.training.model import TrainableModel, enable_gradient_checkpointing
from finetune.training.optimizers import BuiltOptimizer, build_optimizer, own_code, rehearse
from finetune.training.samples import SampleSheets
from finetune.training.teacher import Teacher
from finetune.training.validation import Validator


def prepare(run: Run, reporter: Reporter, how: resume.Resume) -> Loop:
    """Build everything, say what will happen, and restore the newest checkpoint."""
    found = resume.find(run, how)
    # keep: "auto" means another format on another GPU; a resumed run keeps the one it began with.
    began = found.documents["base"]["dtype"] if found and run.model.dtype == "auto" else run.model.dtype
    accelerator, dtype = build.build_accelerator(began, run.train.trackers)
    if found is None and (slow := build.emulated(dtype)):
        raise ConfigError("The run cannot start:", [f"{slow[0]}; set model.dtype=auto"])
    rehearse(run.optimizer, accelerator.device)
    loop, loaded = build_loop(run, accelerator, dtype, reporter, fresh=found is None)
    preflight.check_disk(run, loop.adapters)
    rows = [("Base model", f"{loop.components.source} ({loop.family.name}), {dtype} on {accelerator.device.type}")]
    rows += [*plan.data_rows(run, loaded.cut, loop.pictures), *plan.teacher_rows(run), *loop.adapters.describe()]
    rates = loop.adapters.told_rates()
    rows += plan.step_rows(run, loop.sampler, accelerator.num_processes, loop.optimizer, rates)
    rows += loaded.exports
    reporter.table("Plan", rows)
    plan.tell_problems(reporter, loop.pictures)
    for note in [*build.launch_warnings(), *build.emulated(dtype), *loop.optimizer.notes]:
        reporter.warn(note)
    if found is not None:
        for line in resume.story(found):
            reporter.warn(line)
        restoring.restore(found, loop, how)
        left = f"Resuming after step {loop.state.step} of {run.train.steps}."
        reporter.note(left if loop.state.step < run.train.steps else "This run is finished; nothing is left to train.")
    if accelerator.is_main_process:
        write_json(run.output_dir / "run.json", run_record(run))
        write_json(run.output_dir / "dataset.json", loop.documents["dataset"])
    return loop


@dataclass
class Loaded:
    """The base with adapters, and the pictures as they lie in their folder: all that a plan needs."""

    family: ModelFamily
    components: Components
    objective: Objective
    cut: Cut
    adapters: AdapterSet
    pictures: Pictures
    exports: Rows


def load(run: Run, dtype: str, reporter: Reporter, *, fresh: bool) -> Loaded:
    """Load the base, attach adapters, scan the pictures.

    Args:
        fresh: whether the run begins, rather than goes on from a checkpoint.
    """
    with reporter.progress("Loading the base model", 1) as advance:
        family, components = load_model(run.model, DTYPES[dtype])
        advance(1, "")
    for note in components.notes:
        reporter.warn(note)
    objective = build.build_run_objective(run, components)
    cut = build_data.build_cut(run.data, family, components)
    names = architecture_of(family, components)
    adapters = build_adapters.build_adapters(run, family, components, fresh=fresh)
    exports = preflight.export_rows(run, adapters, names)
    pictures = build_data.build_pictures(run, cut, reporter)
    return Loaded(family, components, objective, cut, adapters, pictures, exports)


def trainable(run: Run, loaded: Loaded) -> TrainableModel:
    """The networks that a step runs."""
    trained_text = loaded.components.text_encoders if run.trains_text() else {}
    if run.train.gradient_checkpointing:
        enable_gradient_checkpointing(loaded.components.denoiser, trained_text)
    return TrainableModel(loaded.family, loaded.components.denoiser, trained_text)


def build_loop(
    run: Run, accelerator: Accelerator, dtype: str, reporter: Reporter, *, fresh: bool
) -> tuple[Loop, Loaded]:
    """Load, render missing class pictures, encode everything; a loop that stands at step 0.

    Args:
        fresh: as for `load`.
    """
    device = accelerator.device
    with accelerator.main_process_first():
        loaded = load(run, dtype, reporter, fresh=fresh)
        pictures = _with_class_pictures(run, loaded, device, reporter)
    family, components, adapters, cut = loaded.family, loaded.components, loaded.adapters, loaded.cut
    objective = loaded.objective.to(device)
    collator = build_data.build_collator(run, pictures, cut, family, components, device, reporter)
    whole = trainable(run, loaded)
    if sharding.asked_for() and accelerator.num_processes > 1:
        piece = sharding.split_base(whole, adapters.tensors().values(), device)
        reporter.note(
            f"FSDP: what is frozen of the base lies in {accelerator.num_processes} pieces of {piece / 2**20:,.1f} MiB."
        )
    model = accelerator.prepare(whole)
    optimizer = build_optimizer(run.optimizer, adapters.parameter_groups(), device)
    sampler = Sampler(
        (p.item() for p in pictures.training), run.train.batch_size * accelerator.num_processes, run.train.seed
    )
    probe = pictures.holdout or pictures.subject[:16]
    ema = Ema(adapters.named_parameters(), run.train.ema_decay, run.train.ema_power) if run.train.ema_decay else None
    loop = Loop(
        run, family, components, adapters, model, objective, optimizer, ema, _mean(ema, optimizer, adapters),
        Teacher(run.objective.teacher, model, adapters, objective, collator, accelerator)
        if run.objective.teacher else None,
        sampler, collator,
        Validator(
            probe, collator, objective,
            quantiles=run.validation.quantiles, at_once=run.train.batch_size, seed=run.train.seed,
        )
        if run.validation.every else None,
        SampleSheets(
            run.samples, family, components, adapters, cut.resolution, run.output_dir / "samples", device, run.digest()
        )
        if run.samples.prompts and accelerator.is_main_process else None,
        accelerator, reporter, _documents(run, pictures, components, dtype, objective, optimizer, accelerator),
        counted(len(probe), f"{'held-out' if pictures.holdout else 'training'} picture"),
        Meter(accelerator, Policy(run.train.on_spike, run.train.spike_deviations, run.train.tolerate_nonfinite)),
        History(run.validation.min_improvement), pictures,
    )  # fmt: skip
    return loop, loaded


def _with_class_pictures(run: Run, loaded: Loaded, device: torch.device, reporter: Reporter) -> Pictures:
    if run.data.prior is None:
        return loaded.pictures
    folder = run.data.prior.folder or run.output_dir / "class_images"
    with loaded.adapters.disabled():
        return build_data.add_class_pictures(
            loaded.pictures, run.data.prior, folder, loaded.cut, loaded.family, loaded.components, device, reporter
        )


def _mean(ema: Ema | None, optimizer: BuiltOptimizer, adapters: AdapterSet) -> Mean | None:
    if optimizer.keeps_mean:
        return ScheduleFreeMean(adapters.named_parameters(), optimizer.optimizer)
    return ema


def _documents(
    run: Run, pictures: Pictures, components: Components, dtype: str, objective: Objective, optimizer: BuiltOptimizer,
    accelerator: Accelerator,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint says about where it belongs."""
    return {
        "run": run_record(run),
        "dataset": fingerprint(pictures.training, pictures.origins),
        "held_out": fingerprint(pictures.holdout),
        "base": {"digest": components.digest, "schedule": build.schedule_digest(components), "dtype": dtype},
        "optimizer_class": {"resolved": optimizer.resolved},
        "own_code": objective.own_code() | own_code(run.optimizer.name),
        "batch": {"pictures per pass over all processes": run.train.batch_size * accelerator.num_processes},
        "numerics": build.numerics(accelerator.device),
    }
