"""What can be known before anything is paid for: the folder of pictures, room on the disk, what killed runs left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from finetune.adapters import AdapterSet
from finetune.adapters.beside import peft_problems
from finetune.config import Run
from finetune.data.folder import check_folder, check_output
from finetune.errors import ConfigError
from finetune.interchange.carrying import automatic, check_formats, left_out
from finetune.interchange.names import Architecture
from finetune.objectives import own
from finetune.tracking import Rows
from finetune.training import sharding
from finetune.training.checkpoint import check_room, clean

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(part|old)-\d+-[0-9a-f]{8}")
"""Names under which this toolkit writes beside; nobody else's files look so."""
SWEPT = (".", "samples", "tracking")
"""Folders of a run that only its trainer writes."""


def sweep(folder: Path) -> list[Path]:
    """Remove half-written files, folders and checkpoints of killed starts of this run; what was removed.

    Only for who holds the folder's lock. What was moved aside goes only if what replaces it is there.
    """
    removed = clean(folder)
    for place in (folder / name for name in SWEPT):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            match = LEFTOVER.fullmatch(path.name)
            if match is None or (".old-" in path.name and not (place / match["name"]).exists()):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def check(run: Run) -> None:
    """What a wrong path would cost after a download of gigabytes.

    Raises:
        ConfigError: if this run cannot be trained as it was launched.
        DataError: if the pictures are not there.
    """
    problems = [*sharding.problems(run), *peft_problems()]
    for name in ("density", "weighting", "loss"):
        path = getattr(run.objective, name)
        try:
            if "." in path:
                own.function(path)
        except own.OwnFunctionError as error:
            problems.append(f"objective.{name}={path}: {error}.")
    if problems:
        raise ConfigError("The run cannot start:", problems)
    check_formats(run.export.formats, run.methods())
    check_output(run.output_dir, run.data.folder)
    check_folder("data.folder", run.data.folder)


def export_rows(run: Run, adapters: AdapterSet, names: Architecture) -> Rows:
    """The formats that the finished adapter is exported in, for the plan.

    Raises:
        ConfigError: if export.formats has one that cannot store it.
    """
    file = adapters.to_file(
        adapters.tensors(), family="", base="", base_digest="", trigger_words=(), run_digest="", step=0
    )
    trained = file.header.method, file.layers(), names
    check_formats(run.export.formats, *trained)
    formats = automatic(*trained) if run.export.formats is None else run.export.formats
    words = ["embeddings"] if file.header.tokens and formats and "embeddings" not in formats else []
    why = left_out(formats, *trained) if run.export.formats is None else {}
    told = "".join(f"; not {name} ({reason})" for name, reason in why.items())
    return [("Exports", f"{', '.join([*formats, *words]) or 'none'}{told}")]


def checkpoint_bytes(run: Run, adapters: AdapterSet) -> int:
    """Bytes of one checkpoint at most: parameters and running mean in fp32, and two 32-bit numbers of state each."""
    parameters = sum(parameter.numel() for parameter in adapters.named_parameters().values())
    return 4 * parameters * (3 + bool(run.train.ema_decay))


def check_disk(run: Run, adapters: AdapterSet) -> None:
    """Refuse to start a run whose first checkpoint has no room.

    Raises:
        StorageError: with what is needed and what is free.
    """
    check_room(run.output_dir, run.output_dir / "the first checkpoint", checkpoint_bytes(run, adapters))
