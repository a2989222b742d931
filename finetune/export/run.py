"""From a finished run folder to files other programs load."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import counted
from finetune.adapters.files import AdapterFile
from finetune.config import Run
from finetune.errors import CheckpointError, ConfigError
from finetune.export.errors import ExportError
from finetune.export.exporting import FORMATS, Exported, export
from finetune.export.gallery import samples_of
from finetune.export.job import ModelInfo
from finetune.export.sidecars import install, places, thumbnail, write_sidecars
from finetune.families import load_model
from finetune.families.places import names_folder
from finetune.interchange.carrying import automatic
from finetune.run_files import dump_run, finished_adapter
from finetune.sampling.merging import merge_first
from finetune.storage import read_json
from finetune.tracking import Reporter, file_size


def export_run(
    run_folder: str | Path, run: Run, output: str | Path | None = None, reporter: Reporter | None = None, *,
    force: bool = False, source: Path | None = None, lossy: int | None = None, program: str = "",
) -> list[Exported]:
    """Export the adapter that a run left, and read every file back.

    Args:
        run_folder: holds adapter.safetensors.
        run: the run that made it; names the base model and the export's formats, name and number format.
        output: folder for the files; None: `exports` in the run folder, and a folder per step in there for `source`.
        force: keep a merged model although rounding takes much of the adapter.
        source: another adapter of this run, such as a checkpoint's, whose files are called after its step; None: the
            finished one.
        lossy: rank of the LoRA that stands in where a format cannot say what the adapter does; None refuses.
        program: "comfyui:FOLDER" or "a1111:FOLDER": copy the files to where it reads them; the notes say where.

    Raises:
        ConfigError: if that program cannot read what is asked for, or its folder is not its own.
        CheckpointError: if the run is not finished, or its base model is not the one it was trained on.
        ExportError: if a format cannot be had; the others are there then, and it says how to get what is missing.
    """
    run_folder, output = Path(run_folder), Path(output) if output else None
    path = source or finished_adapter(run_folder)
    file = AdapterFile.read(path)
    beside = ["embeddings"] if file.header.tokens else []
    formats = run.export.formats or automatic(file.header.method, file.layers())
    wanted = places(program, [*formats, *beside]) if program else {}
    name, target = run.export_name(), output or run_folder / "exports"
    if source:
        # keep: a file beside the finished one, or in a program's folder, must not take its place. So does sd-scripts.
        name = f"{name}-{file.header.step:06d}"
        target = output or target / f"step-{file.header.step:06d}"
    first = run.adapter.merge_first if run.adapter else []
    # keep: what changes weights of the live base is computed in fp32; else they stay as stored, and are widened in use.
    exact = first or file.header.tokens or "full" in file.header.method.values()
    family, components = load_model(run.model, torch.float32 if exact else None, whole=True)
    merge_first(first, family, components, names_folder(run.model.base))
    if file.header.base_digest != components.digest:
        raise CheckpointError(
            f"{path} was trained on the base {file.header.base} with digest {file.header.base_digest[:12]}; "
            f"model.base={run.model.base} has {components.digest[:12]}. Name the base it was trained on."
        )
    side = run.data.resolution or family.native_resolution(components)
    info = replace(run_info(run_folder, run, components.source, side), title=name)
    with (reporter or Reporter()).progress("Exporting and reading back", 1) as advance:
        refused: ExportError | None = None
        try:
            done = export(
                file, family, components, target,
                name=name, formats=run.export.formats, dtype=run.export.dtype, info=info, force=force,
                lossy=lossy, keep_base=False,
            )  # fmt: skip
        except ExportError as error:
            refused, done = error, list(error.done)
        advance(1, "")
    if any(item.format == "kohya" for item in done):
        write_sidecars(target, name, family, file.header.trigger_words, info, _face(run_folder))
    installed = [_installed(item, wanted) for item in done]
    if refused:
        raise _with_command(refused, run_folder, run.export.dtype)
    if program and not any(item.format in wanted for item in done):
        raise ConfigError(
            f"Nothing was installed into {program}: it does not read {', '.join(item.format for item in done)}.",
            [f"the files are in {target}"],
        )
    return installed


def _with_command(refused: ExportError, run_folder: Path, dtype: str) -> ExportError:
    """The same with the command that exports the missing formats."""
    whole = [name for name in refused.formats if FORMATS[name].whole]
    if not whole or dtype == "fp32":
        return refused
    asked = " ".join(f"-f {name}" for name in whole)
    command = f"`finetune export {shlex.quote(str(run_folder))} {asked} --dtype fp32` exports the missing formats."
    return ExportError(refused.headline, [*refused.problems, command], refused.formats, refused.done)


def _installed(item: Exported, wanted: Mapping[str, Path]) -> Exported:
    if item.format not in wanted:
        return item
    copies = install(item.path, wanted[item.format])
    return replace(item, notes=(*item.notes, *(f"installed as {path}" for path in copies)))


def run_info(run_folder: Path, run: Run, base: str, resolution: int) -> ModelInfo:
    """What the exported files say about the run.

    Args:
        base: what the base model is called in public.
        resolution: side of the training pictures, in pixels.
    """
    pictures = _dataset(run_folder)
    face = _face(run_folder)
    return ModelInfo(
        title=run.export_name(),
        description=run.export.description,
        author=run.export.author,
        license=run.export.license,
        images=len(pictures) if pictures else None,
        dataset_digest=hashlib.sha256(json.dumps(pictures, sort_keys=True).encode()).hexdigest() if pictures else "",
        resolution=resolution,
        learning_rate=_learning_rate(run),
        optimizer=run.optimizer.name,
        seed=run.train.seed,
        thumbnail=thumbnail(face) if face else "",
        configuration=without_places(run, base),
        detail=run.export.metadata,
    )


def _learning_rate(run: Run) -> float:
    """Of the first that was trained: the denoiser, else text encoders, else words."""
    trained = next(part for part in (run.adapter, run.text_encoder_adapter, run.tokens) if part is not None)
    return trained.learning_rate or run.optimizer.learning_rate


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


def _within(difference: float) -> str:
    return f"within {difference:.0e}" if difference else "identical"


def exported_rows(exported: Sequence[Exported]) -> list[tuple[str, str]]:
    """One line per export: where it is, its size, and what its readers found.

    For adapter files that is how far the worst reader's change of a layer is from the trained one; for a merged model
    the share of the adapter that its number format rounds away. Both with the largest difference of an output.
    """
    rows = [("Trained for", counted(item.step, "step")) for item in exported[:1]]
    for item in exported:
        size = f"{item.path}  {file_size(item.bytes)}"
        readers = ", ".join(check.reader for check in item.verification)
        worst = item.rounding.total if item.rounding else max(check.weights_relative for check in item.verification)
        outputs = max(check.outputs_relative for check in item.verification)
        found = f"adapter {_within(worst)}, outputs {_within(outputs)}"
        if item.format == "embeddings":
            found = f"vectors {_within(max(check.weights_max_abs for check in item.verification))}"
        if item.lost:
            found += f", {item.lost:.1%} of the change given up"
        rows.append((item.format, f"{size}; {found}, read back by {readers}"))
        rows += [("", note) for note in item.notes]
    return rows
