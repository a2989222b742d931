"""`finetune build`: what a CI job calls. Check, train, score, export, verify, describe, list with hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config import Run
from finetune.early_checks import building
from finetune.errors import NumericError
from finetune.export.card import Card, write_card
from finetune.export.exporting import Exported, sweep
from finetune.export.gallery import BEFORE_AFTER, data_rows, samples_of, write_gallery
from finetune.export.manifest import write_manifest
from finetune.export.run import export_run, exported_rows, without_places
from finetune.interchange.embeddings import file_names, reader_keys
from finetune.storage import atomic_dir, write_json
from finetune.tracking import Reporter
from finetune.training.trainer import TrainResult, train
from finetune.training.validation import Ratio

TIMINGS = frozenset({"seconds_per_step"})
"""Metrics that differ each time."""


@dataclass(frozen=True)
class Artifact:
    """A finished build.

    Attributes:
        folder: everything that was built, listed with hashes in its manifest.json.
        validation: its loss over the base model's.
        judged_on: what it was measured on, in words.
        exported: the files with their verification.
    """

    folder: Path
    validation: Ratio
    judged_on: str
    exported: list[Exported]

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        return [
            ("Loss relative to the base", f"{self.validation} on {self.judged_on}"),
            *exported_rows(self.exported),
            ("Model card", str(self.folder / "README.md")),
            ("Files and hashes", str(self.folder / "manifest.json")),
        ]


def build_artifact(
    run: Run, output: Path, max_ratio: float | None = None, reporter: Reporter | None = None
) -> Artifact | None:
    """Build an adapter; `output` appears whole or not at all.

    Args:
        run: trained in its own output_dir, and resumed there when a job is repeated.
        output: must not exist yet, or be empty.
        max_ratio: gate: the validation loss divided by the base model's may not be above this. None: it must be below
            1 by more than its standard error, so that an adapter that learned nothing does not pass by luck.

    Returns:
        the artifact; None in all but the first of several processes.

    Raises:
        ConfigError: if `output` holds something, validation is off so that there is nothing to judge by, or
            `max_ratio` is no positive number.
        NumericError: if the gate is not passed; the run folder stays for a look, `output` is not made.
    """
    building(run, output, max_ratio)
    reporter = reporter or Reporter()
    if not (run.validation.holdout or run.validation.folder):
        reporter.warn(
            "validation.holdout=0: the gate judges pictures that are trained on, so it cannot see overfitting; "
            "set aside 3 or more"
        )
    result = train(run, reporter)
    if not result.is_main_process:
        return None
    assert result.validation is not None, "checked above: validation is on"
    _check_gate(result.validation, max_ratio, result.judged_on, run.output_dir)
    result.let_go()
    sweep(output.absolute().parent)
    with atomic_dir(output) as folder:
        exported = export_run(run.output_dir, run, folder, reporter)
        _write_records(run, result, exported, folder)
        write_manifest(folder)
    final = [_moved(item, output) for item in exported]
    return Artifact(output, result.validation, result.judged_on, final)


def _check_gate(found: Ratio, max_ratio: float | None, judged_on: str, run_folder: Path) -> None:
    value = f"{found.value:.6g}" + ("" if found.error is None else f" with a standard error of {found.error:.2g}")
    if max_ratio is None:
        passed, wanted = found.value + (found.error or 0.0) < 1, "below 1 by more than its standard error"
    else:
        passed, wanted = found.value <= max_ratio, f"at most {max_ratio:g}"
    if not passed:
        raise NumericError(
            f"The quality gate failed: the loss divided by the base model's is {value} on {judged_on}; it must be "
            f"{wanted}.",
            [
                f"look at {run_folder / 'metrics.jsonl'} and the samples; more steps, another learning rate or a "
                "larger rank may help",
                "more held-out pictures (validation.holdout) make the error smaller; --max-ratio sets another limit, "
                "which the value alone is held against",
            ],
        )


def _write_records(run: Run, result: TrainResult, exported: list[Exported], folder: Path) -> None:
    """Score, configuration, curves, pictures and the model card."""
    assert result.validation is not None, "the build checks that validation is on"
    write_json(
        folder / "score.json",
        {
            "loss_over_base": result.validation.value,
            "standard_error": result.validation.error,
            "judged_on": result.judged_on,
            "bands": list(result.validation.bands),
            "steps": result.steps,
            "run_digest": run.digest(),
            "exports": {item.format: [check.as_dict() for check in item.verification] for item in exported},
        },
    )
    write_json(folder / "run.json", without_places(run, result.components.source))
    _copy_metrics(run.output_dir / "metrics.jsonl", folder / "metrics.jsonl")
    gallery = write_gallery(samples_of(run.output_dir), folder)
    write_card(folder, _card(run, result, result.validation, exported, gallery))


def _copy_metrics(source: Path, target: Path) -> None:
    """The curves without what the clock says, so that two builds of one recipe have the same bytes."""
    lines = (json.loads(line) for line in source.read_text(encoding="utf-8").splitlines())
    kept = ({key: value for key, value in line.items() if key not in TIMINGS} for line in lines)
    target.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in kept), encoding="utf-8")


def _card(
    run: Run, result: TrainResult, validation: Ratio, exported: list[Exported], gallery: list[tuple[str, str]]
) -> Card:
    files = {item.format: item.path.name for item in exported}
    adapter = result.adapter
    encoders = reader_keys(result.family.name, [c for c in result.family.text_encoders if adapter.token_vectors(c)])
    denoiser: Any = result.components.denoiser.config
    return Card(
        title=run.export_name(),
        base=adapter.header.base,
        trigger_words=adapter.header.trigger_words,
        description=run.export.description,
        license=run.export.license,
        author=run.export.author,
        architecture=result.family.modelspec(denoiser, result.components.scheduler_config),
        pipeline=result.family.pipeline_for(denoiser),
        repaints=result.family.repaints(denoiser),
        kohya_file=files.get("kohya", ""),
        diffusers_file=files.get("diffusers", ""),
        merged_folder=files.get("merged", ""),
        single_file=files.get("single-file", ""),
        words=file_names(adapter.header.tokens) if "embeddings" in files else {},
        encoders=encoders,
        words_alone=not adapter.components(),
        figures=[
            (
                "validation loss relative to the base model (below 1 is better)",
                f"{validation}{' (standard error)' if validation.error else ''} on {result.judged_on}",
            )
        ],
        data=data_rows(run.output_dir, run.data.unmasked_weight),
        training=[
            ("steps", str(result.steps)),
            *result.adapters.describe(),
            ("learning rate", result.adapters.told_rates()),
            ("optimizer", run.optimizer.name),
            ("run", run.digest()[:12]),
        ],
        gallery=gallery,
        sheet=BEFORE_AFTER if gallery else "",
    )


def _moved(item: Exported, folder: Path) -> Exported:
    return replace(item, path=folder / item.path.name)
