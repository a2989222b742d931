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
from finetune.export.shown import samples_of
from finetune.export.sidecars import thumbnail, write_sidecars
from finetune.families import load_model
from finetune.families.folders import names_folder
from finetune.run_files import dump_run
from finetune.sampling.merging import merge_first
from finetune.storage import read_json
from finetune.tracking import Reporter


def export_run(
    run_folder: Path, run: Run, output: Path, reporter: Reporter | None = None, *, force: bool = False,
    source: Path | None = None, lossy: int | None = None,
) -> list[Exported]:
    """Export the adapter that a run left, and read every file back.

    Args:
        run_folder: holds adapter.safetensors.
        run: the run that made it; names the base model and the export's formats, name and number format.
        output: folder for the files.
        force: keep a merged model although rounding takes much of the adapter.
        source: another adapter of this run, such as a checkpoint's; None: the finished one.
        lossy: rank of the LoRA that stands in where a format cannot say what the adapter does; None refuses.

    Raises:
        CheckpointError: if the run is not finished, or its base model is not the one it was trained on.
    """
    path = source or run_folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{run_folder} holds no {ADAPTER_FILE}: its run is not finished; go on with `finetune train {run_folder}`."
        )
    file = AdapterFile.read(path)
    # keep: deltas are computed and compared in fp32; what is written is cast once, at the end.
    family, components = load_model(run.model, torch.float32, whole=True)
    if run.adapter is not None:
        merge_first(run.adapter.merge_first, family, components, names_folder(run.model.base))
    if file.header.base_digest != components.digest:
        raise CheckpointError(
            f"{path} was trained on the base {file.header.base} with digest {file.header.base_digest[:12]}; "
            f"model.base={run.model.base} has {components.digest[:12]}. Name the base it was trained on."
        )
    papers = run_papers(run_folder, run, components.source, run.data.resolution or family.native_resolution(components))
    with (reporter or Reporter()).progress("Exporting and reading back", 1) as advance:
        done = export(
            file, family, components, output,
            name=run.export_name(), formats=run.export.formats, dtype=run.export.dtype, papers=papers, force=force,
            lossy=lossy,
        )  # fmt: skip
        advance(1, "")
    if any(item.format == "kohya" for item in done):
        face = _face(run_folder)
        write_sidecars(output, run.export_name(), family, file.header.trigger_words, papers, face)
    return done


def run_papers(run_folder: Path, run: Run, base: str, resolution: int) -> Papers:
    """What the exported files say about the run.

    Args:
        base: what the base model is called in public.
        resolution: side of the training pictures, in pixels.
    """
    pictures = _dataset(run_folder)
    face = _face(run_folder)
    return Papers(
        title=run.export_name(),
        description=run.export.description,
        author=run.export.author,
        license=run.export.license,
        images=len(pictures) if pictures else None,
        dataset_digest=hashlib.sha256(json.dumps(pictures, sort_keys=True).encode()).hexdigest() if pictures else "",
        resolution=resolution,
        learning_rate=(run.adapter.learning_rate if run.adapter else None) or run.optimizer.learning_rate,
        optimizer=run.optimizer.name,
        seed=run.train.seed,
        thumbnail=thumbnail(face) if face else "",
        configuration=without_places(run, base),
        detail=run.export.metadata,
    )


def without_places(run: Run, base: str) -> dict[str, Any]:
    """The run without folders of this machine."""
    document = dump_run(run)
    for section, field in ((document["data"], "folder"), (document, "output_dir")):
        section[field] = Path(section[field]).name
    document["data"]["cache_folder"] = None
    if document["data"]["prior"]:
        document["data"]["prior"]["folder"] = None
    document["model"]["base"] = base
    return document


def _face(run_folder: Path) -> Path | None:
    """The picture that stands for the adapter: its newest answer to the first prompt."""
    return next((sample.after for sample in samples_of(run_folder)), None)


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
        size = f"{item.path}  {item.bytes / 2**20:.2f} MB"
        readers = ", ".join(check.reader for check in item.verification)
        worst = item.rounding.total if item.rounding else max(check.weights_relative for check in item.verification)
        outputs = max(check.outputs_relative for check in item.verification)
        found = f"adapter within {worst:.1e}, outputs within {outputs:.1e}"
        if item.format == "embeddings":
            found = f"vectors within {max(check.weights_max_abs for check in item.verification):.1e}"
        if item.lost:
            found += f", {item.lost:.1%} of the change given up"
        rows.append((item.format, f"{size}; {found}, read back by {readers}"))
        rows += [("", note) for note in item.notes]
    return rows
