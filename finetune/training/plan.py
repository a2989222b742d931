"""The plan: what will happen, in numbers, before the first step is paid for."""

from __future__ import annotations

from accelerate import Accelerator

from finetune.adapters import AdapterSet
from finetune.config import Run
from finetune.data.dataset import Cut, bucket_counts
from finetune.data.sampler import Sampler
from finetune.families.base import Components, ModelFamily
from finetune.tracking import Reporter
from finetune.training.build import Pictures
from finetune.training.optimizers import BuiltOptimizer


def show(
    reporter: Reporter, run: Run, family: ModelFamily, components: Components, cut: Cut, pictures: Pictures,
    adapters: AdapterSet, optimizer: BuiltOptimizer, sampler: Sampler, accelerator: Accelerator, dtype: str,
) -> None:  # fmt: skip
    """Show the plan as a table, then the warnings of the scan and of the optimizer."""
    rows = [("Base model", f"{components.source} ({family.name}), {dtype} on {accelerator.device.type}")]
    rows += _data_rows(run, cut, pictures)
    rows += _adapter_rows(run, adapters)
    rows += _step_rows(run, sampler, accelerator, optimizer)
    reporter.table("Plan", rows)
    for problem in pictures.problems:
        (reporter.warn if problem.severity == "warning" else reporter.note)(
            f"{problem.file_name}: {problem.what}; {problem.remedy}"
        )
    for note in optimizer.notes:
        reporter.warn(note)


def _data_rows(run: Run, cut: Cut, pictures: Pictures) -> list[tuple[str, str]]:
    buckets = ", ".join(
        f"{count} x {width}x{height}" + (f" ({lost:.0%} cropped)" if lost >= 0.005 else "")
        for (height, width), count, lost in bucket_counts(pictures.training)
    )
    subject = f"{len(pictures.subject)} pictures" + (f", {len(pictures.holdout)} held out" if pictures.holdout else "")
    rows = [("Subject", subject)]
    classes = len(pictures.training) - len(pictures.subject)
    if run.data.prior:
        made = f" ({pictures.generated} rendered now)" if pictures.generated else ""
        rows.append(("Class", f"{classes} pictures{made}, weight {run.data.prior.prior_loss_weight:g}"))
    return [*rows, ("Buckets", f"{buckets}; {cut.resolution} px")]


def _adapter_rows(run: Run, adapters: AdapterSet) -> list[tuple[str, str]]:
    named = adapters.named_parameters()
    rows = []
    for component in dict.fromkeys(name.partition(".")[0] for name in named):
        own = [p for name, p in named.items() if name.startswith(f"{component}.")]
        config = run.text_encoder_adapter if component.startswith("text_encoder") else run.adapter
        assert config is not None, "a text encoder is trained only when its adapter is configured"
        size = sum(p.numel() for p in own)
        rows.append(
            (f"Adapter, {component}", f"{config.method} rank {config.rank}, {len(own) // 2} layers, {size:,} parameters")
        )
    return rows


def _step_rows(
    run: Run, sampler: Sampler, accelerator: Accelerator, optimizer: BuiltOptimizer
) -> list[tuple[str, str]]:
    accumulation = run.train.gradient_accumulation_steps
    per_step = run.train.batch_size * accelerator.num_processes * accumulation
    batches = len(sampler.plan_epoch(0))
    epochs = run.train.steps * accumulation / batches
    processes = f" x {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    rate = run.optimizer
    checkpointing = "on" if run.train.gradient_checkpointing else "off"
    return [
        ("Steps", f"{run.train.steps}, up to {per_step} pictures each ({run.train.batch_size} per pass{processes}"
                  f"{f' x {accumulation} passes' if accumulation > 1 else ''})"),
        ("Epochs", f"{epochs:.1f} of {batches} passes"),
        ("Optimizer", f"{optimizer.resolved}, learning rate {rate.learning_rate:g}, {rate.schedule}"
                      + (f", {rate.warmup_steps} warm-up steps" if rate.warmup_steps else "")),
        ("Gradient checkpointing", checkpointing),
        ("Saved", f"every {run.checkpoint.every} steps, the newest {run.checkpoint.keep} kept, in {run.output_dir}"),
    ]  # fmt: skip
