"""From a trained adapter to files that load everywhere, each proven by reading it back."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import storage
from finetune.adapters.files import AdapterFile
from finetune.errors import ConfigError, nearest
from finetune.export import adapter, merged
from finetune.export.card import Card, write_card
from finetune.export.job import DTYPES, ExportError, Job, Papers
from finetune.export.manifest import check_manifest, write_manifest
from finetune.export.merged import Rounding
from finetune.export.verify import Verification, reference, verify
from finetune.families.base import Components, ModelFamily

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""diffusers prefers this name when a folder holds several files."""


@dataclass(frozen=True)
class Format:
    """One way of writing an adapter.

    Attributes:
        summary: who reads it.
        target: export name -> name of the file or folder inside the output folder.
        write: writes it; a merged model also says what rounding took.
        readers: names in `readers.READERS`; each must read the file back as it was trained.
    """

    summary: str
    target: Callable[[str], str]
    write: Callable[[Job, Path], Rounding | None]
    readers: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "diffusers": Format(
        "one file for diffusers' load_lora_weights",
        lambda name: DIFFUSERS_FILE,
        adapter.write_diffusers,
        ("diffusers",),
    ),
    "kohya": Format(
        "one file for A1111, Forge, ComfyUI, InvokeAI, sd-scripts and diffusers",
        lambda name: f"{name}.safetensors",
        adapter.write_kohya,
        ("kohya", "diffusers"),
    ),
    "peft": Format("a folder per network for PEFT", lambda name: "peft", adapter.write_peft, ("peft",)),
    "merged": Format(
        "the whole pipeline with the adapter added in, as a diffusers folder",
        lambda name: "merged",
        merged.write_merged,
        ("pipeline",),
    ),
}
"""name -> format; what `finetune export --format` offers."""


@dataclass(frozen=True)
class Exported:
    """A file or folder that was written, read back and found right.

    Attributes:
        path: the file, or the folder for formats that are one.
        bytes: its size; of all files together for a folder.
        verification: one entry per reader.
        rounding: for a merged model, what its number format takes from the adapter.
    """

    format: str
    path: Path
    bytes: int
    verification: tuple[Verification, ...]
    rounding: Rounding | None = None


def export(  # noqa: PLR0913 - what the user chooses, one keyword each
    file: AdapterFile,
    family: ModelFamily,
    components: Components,
    output_dir: Path,
    *,
    name: str,
    formats: Sequence[str] = ("diffusers", "kohya"),
    dtype: str = "fp32",
    papers: Papers | None = None,
    force: bool = False,
) -> list[Exported]:
    """Write an adapter in some formats and prove each by reading it back the way its users' programs do.

    All or nothing: files get their final names when every one of them has passed. The same adapter gives the
    same bytes.

    Args:
        components: the base it was trained on, with no adapter attached; never changed.
        output_dir: made if missing; files of an earlier export are replaced.
        name: what the kohya file is called, without an ending; also the title if `papers` gives none.
        formats: names in FORMATS.
        dtype: "fp32", "fp16" or "bf16", of the written weights.
        papers: what the files say about themselves.
        force: keep a merged model although rounding takes more of the adapter than is allowed.

    Returns:
        one entry per format, in the order asked for.

    Raises:
        ConfigError: for an unknown format, number format or name.
        CheckpointError: if the adapter does not fit the base.
        ExportError: if the adapter is broken or a file does not read back as it was trained; nothing is kept
            then.
        StorageError: if the disk is full or cannot be written.
    """
    _check_request(name, formats, dtype)
    job = Job(file, family, components, name, DTYPES[dtype], papers or Papers(), force)
    adapter.check(job)
    truth = reference(job)
    staging = output_dir / f".export-{os.getpid()}"
    results = []
    try:
        with storage.disk_errors(output_dir):
            for format_name in dict.fromkeys(formats):
                layout = FORMATS[format_name]
                path = staging / layout.target(name)
                rounding = layout.write(job, path)
                checks = tuple(verify(job, path, reader, truth) for reader in layout.readers)
                results.append(Exported(format_name, output_dir / path.name, _size(path), checks, rounding))
            for result in results:
                storage.publish(staging / result.path.name, result.path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return results


def _check_request(name: str, formats: Sequence[str], dtype: str) -> None:
    problems = [
        f"format {wanted!r} is not known{nearest(wanted, FORMATS)}; choose from {', '.join(FORMATS)}."
        for wanted in formats
        if wanted not in FORMATS
    ]
    if not formats:
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
        raise ConfigError("The adapter cannot be exported like this:", problems)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


__all__ = [
    "DTYPES",
    "FORMATS",
    "Card",
    "ExportError",
    "Exported",
    "Format",
    "Papers",
    "Rounding",
    "Verification",
    "check_manifest",
    "export",
    "write_card",
    "write_manifest",
]
