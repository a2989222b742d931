"""From a trained adapter to files that load everywhere, each proven by reading it back."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune import storage
from finetune.adapters.files import AdapterFile
from finetune.dtypes import DTYPES
from finetune.errors import ConfigError, nearest
from finetune.export import adapter, changes, embeddings, merged
from finetune.export.compatibility import readers_of
from finetune.export.errors import ExportError
from finetune.export.interchange import architecture
from finetune.export.job import Job, ModelInfo, Outcome, Rounding
from finetune.export.verify import Reference, Verification, reference, verify
from finetune.families.base import Components, ModelFamily
from finetune.interchange.carrying import automatic

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""diffusers prefers this name when a folder holds several files."""


LEFTOVER = re.compile(r"\.export-\d+(-[0-9a-f]{8})?|\..+\.(part|old)-\d+-[0-9a-f]{8}")
"""Folders of exports and builds that were killed."""
LEFTOVER_SECONDS = 3600.0


@dataclass(frozen=True)
class Format:
    """One way of writing an adapter.

    Attributes:
        summary: who reads it.
        target: export name -> name of the file or folder inside the output folder.
        write: writes it, and says what that came to.
        readers: names in `readers.READERS`; each that can use this family's file must read it back as it was trained.
        whole: whether it holds a whole model, so that reading it back takes as much memory as the base.
    """

    summary: str
    target: Callable[[str], str]
    write: Callable[[Job, Path], Outcome]
    readers: tuple[str, ...]
    whole: bool = False


FORMATS: dict[str, Format] = {
    "diffusers": Format(
        "one file for diffusers' load_lora_weights",
        lambda name: DIFFUSERS_FILE,
        adapter.writer("diffusers"),
        ("diffusers",),
    ),
    "kohya": Format(
        "one file for A1111, Forge, ComfyUI, InvokeAI, sd-scripts and diffusers",
        lambda name: f"{name}.safetensors",
        adapter.writer("kohya"),
        ("kohya", "diffusers"),
    ),
    "peft": Format("a folder per network for PEFT", lambda name: "peft", adapter.writer("peft"), ("peft",)),
    "merged": Format(
        "the whole pipeline with the adapter added in, as a diffusers folder",
        lambda name: "merged",
        merged.write_merged,
        ("pipeline",),
        whole=True,
    ),
    "single-file": Format(
        "the whole model with the adapter added in, as one file for A1111, ComfyUI and from_single_file",
        lambda name: f"{name}-merged.safetensors",
        merged.write_single,
        ("from_single_file",),
        whole=True,
    ),
    "embeddings": Format(
        "learned words, a file each, for A1111, ComfyUI and load_textual_inversion",
        lambda name: embeddings.FOLDER,
        embeddings.write_words,
        (),
    ),
}
"""name -> format; what `finetune export --format` offers."""


@dataclass(frozen=True)
class Exported:
    """A file or folder that was written, read back and found right.

    Attributes:
        path: the file, or the folder for formats that are one.
        bytes: its size; of all files together for a folder.
        step: of the run, after which the adapter was saved.
        verification: one entry per reader.
        rounding: for a merged model, what its number format takes from the adapter.
        lost: share of the change of the weights that was given up with `lossy`.
        notes: what a user should know of it, such as programs that cannot use it and why.
    """

    format: str
    path: Path
    bytes: int
    step: int
    verification: tuple[Verification, ...]
    rounding: Rounding | None = None
    lost: float = 0.0
    notes: tuple[str, ...] = ()


def export(  # noqa: PLR0913 - what the user chooses, one keyword each
    file: AdapterFile,
    family: ModelFamily,
    components: Components,
    output_dir: Path,
    *,
    name: str,
    formats: Sequence[str] | None = None,
    dtype: str = "fp32",
    info: ModelInfo | None = None,
    force: bool = False,
    lossy: int | None = None,
    keep_base: bool = True,
) -> list[Exported]:
    """Write an adapter in some formats and prove each by reading it back the way its users' programs do.

    Files get their final names when all were tried: those that passed, and none that did not. The same adapter gives
    the same bytes.

    Args:
        components: the base it was trained on, with no adapter attached; not changed. Its weights may be in half
            precision; all is computed in fp32 or finer.
        output_dir: made if missing; files of an earlier export are replaced.
        name: what the kohya file is called, without an ending; also the title if `info` gives none.
        formats: names in FORMATS; None: diffusers and kohya as far as they can store it, see `carrying.automatic`.
        dtype: "fp32", "fp16" or "bf16", of the written weights.
        info: what the files say about themselves.
        force: keep a merged model although rounding takes more of the adapter than is allowed.
        lossy: rank of the LoRA that stands in where a layout cannot say what the adapter does; the loss is measured
            and written into the file. None refuses instead.
        keep_base: False lets the base's weights go before whole models are read back, so that no two models are held
            at a time; `components` is of no use afterwards.

    Returns:
        one entry per format, in the order asked for.

    Raises:
        ConfigError: for an unknown format, number format or name.
        CheckpointError: if the adapter does not fit the base.
        ExportError: if the adapter is broken or a file does not read back as it was trained; it says which formats
            were refused, and which are there.
        StorageError: if the disk is full or cannot be written.
    """
    _check_request(name, formats, dtype)
    job = Job(file, family, components, name, DTYPES[dtype], info or ModelInfo(), force, lossy)
    changes.check(job)
    if formats is None:
        formats = automatic(file.header.method, file.layers(), architecture(job))
    truth = reference(job)
    sweep(output_dir)
    staging = output_dir / f".export-{os.getpid()}-{secrets.token_hex(4)}"
    results: dict[str, Exported] = {}
    try:
        with storage.disk_errors(output_dir):
            asked = _asked(job, formats)
            refused: dict[str, ExportError] = {}
            for small in (name for name in asked if not FORMATS[name].whole):
                with _noting(refused, small):
                    results[small] = _read_back(job, small, staging, truth, _written(job, small, staging))
            outcomes = {}
            for large in (name for name in asked if FORMATS[name].whole):
                with _noting(refused, large):
                    outcomes[large] = _written(job, large, staging)
            if outcomes and not keep_base:
                components.let_go()
            for large, outcome in outcomes.items():
                with _noting(refused, large):
                    results[large] = _read_back(job, large, staging, truth, outcome)
            for key, result in results.items():
                storage.publish(staging / result.path.name, output_dir / result.path.name)
                results[key] = replace(result, path=output_dir / result.path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    done = [results[key] for key in asked if key in results]
    if refused:
        raise _all_of(refused, done)
    return _with_left_out(job, formats, done)


def _written(job: Job, format_name: str, staging: Path) -> Outcome:
    """Write one format beside its place."""
    layout = FORMATS[format_name]
    return layout.write(job, staging / layout.target(job.name))


def _read_back(job: Job, format_name: str, staging: Path, truth: Reference, outcome: Outcome) -> Exported:
    """What the readers of a format find in what was written."""
    layout = FORMATS[format_name]
    path = staging / layout.target(job.name)
    readers, notes = readers_of(job, path, format_name, layout.readers)
    checks = tuple(verify(job, path, reader, truth, outcome) for reader in readers)
    if format_name == "embeddings":
        worst, count = embeddings.check_words(job, path)
        checks = (Verification("load_textual_inversion", count, worst, 0.0, "", 0.0, 0.0, 0.0, 0.0),)
    step = job.file.header.step
    return Exported(
        format_name, path, _size(path), step, checks, outcome.rounding, outcome.lost, (*outcome.notes, *notes)
    )


@contextlib.contextmanager
def _noting(refused: dict[str, ExportError], format_name: str) -> Iterator[None]:
    try:
        yield
    except ExportError as error:
        refused[format_name] = error


def _all_of(refused: Mapping[str, ExportError], done: Sequence[Exported]) -> ExportError:
    """All formats at once that cannot be had, beside those that are there."""
    headline, problems = next((error.headline, error.problems) for error in refused.values())
    if len(refused) > 1:
        headline = f"{len(refused)} formats cannot be exported and were not kept."
        problems = tuple(
            told for name, error in refused.items() for told in (f"{name}: {error.headline}", *error.problems)
        )
    there = [f"these formats are exported and verified: {', '.join(item.format for item in done)}."] if done else []
    return ExportError(headline, [*problems, *there], tuple(refused), tuple(done))


def _with_left_out(job: Job, formats: Sequence[str], done: list[Exported]) -> list[Exported]:
    """The exports, with a note on those that were asked for and would hold nothing."""
    left = [name for name in dict.fromkeys(formats) if name in adapter.LAYOUTS] if not job.file.components() else []
    note = f"only words were learned, so there is nothing to export as {' or '.join(left)}"
    return [
        replace(item, notes=(*item.notes, note)) if left and item.format == "embeddings" else item for item in done
    ]


def _asked(job: Job, formats: Sequence[str]) -> list[str]:
    """The formats to write: learned words go beside every file that has no place for them, and may be all there is."""
    asked = list(dict.fromkeys(formats))
    if not job.file.header.tokens:
        return asked
    if not job.file.components():
        asked = [name for name in asked if name not in adapter.LAYOUTS]
    beside = any(name != "merged" for name in formats)
    return [*asked, *(["embeddings"] if beside and "embeddings" not in asked else [])]


def sweep(folder: Path) -> None:
    """Remove what killed exports left behind; what another process may still be writing stays for an hour."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _check_request(name: str, formats: Sequence[str] | None, dtype: str) -> None:
    problems = [
        f"format {wanted!r} is not known{nearest(wanted, FORMATS)}; choose from {', '.join(FORMATS)}."
        for wanted in formats or ()
        if wanted not in FORMATS
    ]
    if formats is not None and not formats:
        problems.append(f"no format is given; choose from {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        problems.append(
            f"dtype {dtype!r} is not known{nearest(dtype, DTYPES)}; choose from {', '.join(DTYPES)}."
        )
    if (
        not re.fullmatch(r"\w[\w .+-]*", name)
        or f"{name}.safetensors" == DIFFUSERS_FILE
        or name.endswith(".")
    ):
        problems.append(
            f"name {name!r} cannot be a file name; use letters, digits, spaces, '.', '_', '+' and '-' "
            f"(and not the name diffusers looks for, {DIFFUSERS_FILE})."
        )
    if problems:
        raise ConfigError("The adapter cannot be exported this way:", problems)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
