"""`finetune build`: what a CI job calls. Check, train, score, export, verify, describe, list with hashes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.before import building
from finetune.config import Run
from finetune.errors import NumericError
from finetune.export import Exported, sweep
from finetune.export.card import Card, write_card
from finetune.export.manifest import write_manifest
from finetune.export.run import export_run, exported_rows, without_places
from finetune.export.shown import BEFORE_AFTER, data_rows, samples_of, write_gallery
from finetune.interchange.words import file_names, reader_keys
from finetune.storage import atomic_dir, write_json
from finetune.tracking import Reporter
from finetune.training.trainer import TrainResult, train
from finetune.training.validation import Ratio


@dataclass(frozen=True)
class Artifact:
    """A finished build.

    Attributes:
        folder: everything that was built, listed with hashes in its manifest.json.
        ratio: validation loss over the base model's.
        error: its standard error over pictures.
        judged_on: what it was measured on, in words.
        exported: the files with their verification.
    """

    folder: Path
    ratio: float
    error: float
    judged_on: str
    exported: list[Exported]

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        return [
            ("Loss against the base", f"{self.ratio:.3f} +- {self.error:.3f} on {self.judged_on}"),
            *exported_rows(self.exported),
            ("Model card", str(self.folder / "README.md")),
            ("Files and hashes", str(self.folder / "manifest.json")),
        ]


def build_artifact(
    run: Run, output: Path, max_ratio: float, reporter: Reporter | None = None
) -> Artifact | None:
    """Build an adapter; `output` appears whole or not at all.

    Args:
        run: trained in its own output_dir, and resumed there when a job is repeated.
        output: must not exist yet, or be empty.
        max_ratio: gate: the validation loss divided by the base model's may not be above this.

    Returns:
        the artifact; None in all but the first of several processes.

    Raises:
        ConfigError: if `output` holds something, or validation is off so that there is nothing to judge by.
        NumericError: if the gate is not passed; the run folder stays for a look, `output` is not made.
    """
    building(run, output)
    reporter = reporter or Reporter()
    if not run.validation.holdout:
        reporter.warn(
            "validation.holdout=0: the gate judges pictures that are trained on, so it cannot see overfitting; "
            "set aside 2 or more"
        )
    result = train(run, reporter)
    if not result.is_main_process:
        return None
    assert result.validation is not None, "checked above: validation is on"
    ratio, error = result.validation.value, result.validation.error
    if not ratio <= max_ratio:
        raise NumericError(
            f"The gate is not passed: loss over base is {ratio:.3f} +- {error:.3f} on {result.judged_on}, allowed is "
            f"{max_ratio:g}.",
            [
                f"look at {run.output_dir / 'metrics.jsonl'} and the samples; more steps, another learning rate or a "
                "larger rank may help; --max-ratio sets the gate"
            ],
        )
    result.let_go()
    sweep(output.absolute().parent)
    with atomic_dir(output) as folder:
        exported = export_run(run.output_dir, run, folder, reporter)
        _papers(run, result, exported, folder)
        write_manifest(folder)
    final = [_moved(item, output) for item in exported]
    return Artifact(output, ratio, error, result.judged_on, final)


def _papers(run: Run, result: TrainResult, exported: list[Exported], folder: Path) -> None:
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
    shutil.copyfile(run.output_dir / "metrics.jsonl", folder / "metrics.jsonl")
    gallery = write_gallery(samples_of(run.output_dir), folder)
    write_card(folder, _card(run, result, result.validation, exported, gallery))


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
                "loss over the base model's (1: as good as the base; lower is better)",
                f"{validation.value:.3f} +- {validation.error:.3f} (standard error) on {result.judged_on}",
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
