"""The plan: what will happen, in numbers, before the first step is paid for."""

from __future__ import annotations

from finetune.adapters import AdapterSet
from finetune.config import Run
from finetune.data.dataset import Cut, bucket_counts
from finetune.data.sampler import Sampler
from finetune.tracking import Reporter
from finetune.training.build_data import Pictures
from finetune.training.optimizers import BuiltOptimizer


def tell_problems(reporter: Reporter, pictures: Pictures) -> None:
    """What the scan found that does not stop the run."""
    for problem in pictures.problems:
        (reporter.warn if problem.severity == "warning" else reporter.note)(
            f"{problem.file_name}: {problem.what}; {problem.remedy}"
        )


def data_rows(run: Run, cut: Cut, pictures: Pictures) -> list[tuple[str, str]]:
    """Pictures and buckets."""
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


def adapter_rows(run: Run, adapters: AdapterSet) -> list[tuple[str, str]]:
    """What is trained, per network."""
    named = adapters.named_parameters()
    rows = []
    for component in dict.fromkeys(name.partition(".")[0] for name in named):
        own = [p for name, p in named.items() if name.startswith(f"{component}.")]
        config = run.text_encoder_adapter if component.startswith("text_encoder") else run.adapter
        assert config is not None, "a text encoder is trained only when its adapter is configured"
        size = sum(p.numel() for p in own)
        rows.append(
            (
                f"Adapter, {component}",
                f"{config.method} rank {config.rank}, {len(own) // 2} layers, {size:,} parameters",
            )
        )
    return rows


def step_rows(run: Run, sampler: Sampler, processes: int, optimizer: BuiltOptimizer) -> list[tuple[str, str]]:
    """How long, how fast, and what is kept."""
    accumulation = run.train.gradient_accumulation_steps
    per_step = run.train.batch_size * processes * accumulation
    batches = len(sampler.plan_epoch(0))
    epochs = run.train.steps * accumulation / batches
    times = f" x {processes} processes" if processes > 1 else ""
    rate = run.optimizer
    checkpointing = "on" if run.train.gradient_checkpointing else "off"
    return [
        ("Steps", f"{run.train.steps}, up to {per_step} pictures each ({run.train.batch_size} per pass{times}"
                  f"{f' x {accumulation} passes' if accumulation > 1 else ''})"),
        ("Epochs", f"{epochs:.1f} of {batches} passes"),
        ("Optimizer", f"{optimizer.resolved}, learning rate {rate.learning_rate:g}, {rate.schedule}"
                      + (f", {rate.warmup_steps} warm-up steps" if rate.warmup_steps else "")),
        ("Gradient checkpointing", checkpointing),
        ("Saved", f"every {run.checkpoint.every} steps, the newest {run.checkpoint.keep} kept, in {run.output_dir}"),
    ]  # fmt: skip
