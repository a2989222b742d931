"""The plan: what will happen, in numbers, before the first step is paid for."""

from __future__ import annotations

from data_tools.errors import counted
from finetune.config import Run
from finetune.data.dataset import Cut, bucket_counts
from finetune.data.sampler import Sampler
from finetune.tracking import Reporter
from finetune.training.build_data import Pictures, variation_rows
from finetune.training.lr_schedules import warmup_steps
from finetune.training.optimizers import BuiltOptimizer


def tell_problems(reporter: Reporter, pictures: Pictures) -> None:
    """What the scan found that does not stop the run."""
    for problem in pictures.problems:
        told = "; ".join(part for part in (problem.what, problem.remedy) if part)
        say = reporter.warn if problem.severity == "warning" else reporter.note
        say(f"{problem.file_name}: {told}" if problem.file_name else told)


def data_rows(run: Run, cut: Cut, pictures: Pictures) -> list[tuple[str, str]]:
    """Pictures and buckets."""
    buckets = ", ".join(
        f"{count} x {width}x{height}" + (f" ({lost:.0%} cropped)" if lost >= 0.005 else "")
        for (height, width), count, lost in bucket_counts(pictures.training)
    )
    subject = counted(len(pictures.subject), "picture")
    subject += f", {len(pictures.holdout)} held out" if pictures.holdout else ""
    rows = [("Subject", subject)]
    classes = len(pictures.training) - len(pictures.subject)
    if classes:
        made = f" ({pictures.generated} rendered now)" if pictures.generated else ""
        weight = run.data.prior.prior_loss_weight if run.data.prior else 1.0
        rows.append(("Class", f"{counted(classes, 'picture')}{made}, weight {weight:g}"))
    return [*rows, ("Buckets", f"{buckets}; {cut.resolution} px"), *variation_rows(run, cut, pictures)]


def step_rows(
    run: Run, sampler: Sampler, processes: int, optimizer: BuiltOptimizer, rates: str
) -> list[tuple[str, str]]:
    """How long, how fast, and what is kept.

    Args:
        rates: the learning rates in words, see `AdapterSet.told_rates`.
    """
    accumulation = run.train.gradient_accumulation_steps
    per_step = run.train.batch_size * processes * accumulation
    batches = len(sampler.plan_epoch(0))
    epochs = run.train.steps * accumulation / batches
    times = f" x {processes} processes" if processes > 1 else ""
    warmup = warmup_steps(run.optimizer, run.train.steps)
    also = [f"every {run.checkpoint.keep_every}th step"] if run.checkpoint.keep_every else []
    also += ["the best"] if run.checkpoint.keep_best else []
    checkpointing = "on" if run.train.gradient_checkpointing else "off"
    return [
        ("Steps", f"{run.train.steps}, up to {counted(per_step, 'picture')} each ("
                  f"{run.train.batch_size} per pass{times}"
                  f"{f' x {accumulation} passes' if accumulation > 1 else ''})"),
        ("Epochs", f"{epochs:.1f}, each {counted(batches, 'pass', 'passes')}"),
        ("Optimizer", f"{optimizer.resolved}, learning rate {rates}, {run.optimizer.schedule}"
                      + (f", {counted(warmup, 'warm-up step')}" if warmup else "")),
        ("Gradient checkpointing", checkpointing),
        ("Saved", f"every {counted(run.checkpoint.every, 'step')}, the newest {run.checkpoint.keep} kept"
                  f"{''.join(f' and {what}' for what in also)}, in {run.output_dir}"),
    ]  # fmt: skip


def teacher_rows(run: Run) -> list[tuple[str, str]]:
    """Prior preservation without class pictures."""
    teacher = run.objective.teacher
    if teacher is None:
        return []
    return [("Class", f"the base as teacher, weight {teacher.weight:g}, asked every {counted(teacher.every, 'step')}")]
