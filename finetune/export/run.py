"""From a finished run folder to files other programs load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.files import ADAPTER_FILE, AdapterFile
from finetune.config import Run
from finetune.errors import CheckpointError
from finetune.export import Exported, export
from finetune.export.job import Papers
from finetune.families import load_family
from finetune.storage import read_json
from finetune.tracking import Reporter


def export_run(
    run_folder: Path, run: Run, output: Path, reporter: Reporter | None = None, *, force: bool = False
) -> list[Exported]:
    """Export the adapter that a run left, and read every file back.

    Args:
        run_folder: holds adapter.safetensors.
        run: the run that made it; names the base model and the export's formats, name and number format.
        output: folder for the files.
        force: keep a merged model although rounding takes much of the adapter.

    Raises:
        CheckpointError: if the run is not finished, or its base model is not the one it was trained on.
    """
    path = run_folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{run_folder} holds no {ADAPTER_FILE}: its run is not finished; go on with `finetune train {run_folder}`."
        )
    file = AdapterFile.read(path)
    # keep: deltas are computed and compared in fp32; what is written is cast once, at the end.
    family, components = load_family(
        run.model.base, dtype=torch.float32, revision=run.model.revision, variant=run.model.variant
    )
    if file.header.base_digest != components.digest:
        raise CheckpointError(
            f"{path} was trained on the base {file.header.base} with digest {file.header.base_digest[:12]}; "
            f"model.base={run.model.base} has {components.digest[:12]}. Name the base it was trained on."
        )
    pictures = _dataset(run_folder)
    papers = Papers(
        title=run.export_name(),
        images=len(pictures) if pictures else None,
        dataset_digest=hashlib.sha256(json.dumps(pictures, sort_keys=True).encode()).hexdigest() if pictures else "",
        resolution=run.data.resolution or family.native_resolution(components),
        learning_rate=run.adapter.learning_rate or run.optimizer.learning_rate,
        optimizer=run.optimizer.name,
        seed=run.train.seed,
    )
    with (reporter or Reporter()).progress("Exporting and reading back", 1) as advance:
        done = export(
            file, family, components, output,
            name=run.export_name(), formats=run.export.formats, dtype=run.export.dtype, papers=papers, force=force,
        )  # fmt: skip
        advance(1, "")
    return done


def _dataset(run_folder: Path) -> dict[str, Any]:
    """The subject's pictures as the run recorded them; empty for a folder without a record."""
    record = run_folder / "dataset.json"
    known = read_json(record) if record.is_file() else {}
    return {name: facts for name, facts in known.items() if name.startswith("instance/")}


def exported_rows(exported: Sequence[Exported]) -> list[tuple[str, str]]:
    """One line per export: where it is, its size, and what its readers found.

    For adapter files that is how far the worst reader's change of a layer is from the trained one; for a merged model
    the share of the adapter that its number format rounds away. Both with the largest difference of an output.
    """
    rows = []
    for item in exported:
        worst = item.rounding.total if item.rounding else max(check.weights_relative for check in item.verification)
        outputs = max(check.outputs_relative for check in item.verification)
        readers = ", ".join(check.reader for check in item.verification)
        found = f"adapter within {worst:.1e}, outputs within {outputs:.1e}, read back by {readers}"
        rows.append((item.format, f"{item.path}  {item.bytes / 2**20:.2f} MB; {found}"))
    return rows
