"""What a command refuses before torch is imported: seconds of waiting for a misspelt name are seconds too many.

Everything here is judged again where it is used; nothing is loaded, made or written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from finetune.config import Run
from finetune.data.folder import check_folder, check_output
from finetune.errors import ConfigError, UserError
from finetune.families.places import check_place
from finetune.header import read_header
from finetune.interchange.carrying import check_formats
from finetune.interchange.sources import open_sources
from finetune.run_files import finished_adapter
from finetune.training import resume
from finetune.training.lock import check_free


def training(run: Run, how: resume.Resume) -> None:
    """Refuse a run whose base, pictures, folder or checkpoint cannot be meant.

    Raises:
        UserError: with everything that was found.
    """
    # keep: of several processes the first holds the folder while the others start.
    first = os.environ.get("RANK", "0") == "0"
    _all(*([partial(check_free, run.output_dir)] if first else []), *_of_run(run, how))


def planning(run: Run) -> None:
    """Refuse what `training` would, but for a run that is under way."""
    _all(*_of_run(run, resume.Resume()))


def _of_run(run: Run, how: resume.Resume) -> list[Callable[[], object]]:
    return [
        partial(check_place, run.model.base),
        partial(check_formats, run.export.formats, run.methods()),
        partial(check_output, run.output_dir, run.data.folder),
        partial(check_folder, "data.folder", run.data.folder),
        partial(resume.check, run, how),
    ]


def building(run: Run, output: Path, max_ratio: float | None = None) -> None:
    """Refuse a place for an artifact that holds something, a run that nothing could be judged by, and a senseless gate.

    Raises:
        ConfigError: with everything that was found.
    """
    problems = []
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        problems.append(f"{output} is not empty; choose a new folder")
    if output.is_mount():
        problems.append(f"{output} is a mount point and cannot be replaced as a whole; choose a folder inside it")
    if not run.validation.every:
        problems.append("validation.every=0 leaves nothing to score the adapter by; set it to a number of steps")
    if max_ratio is not None and not 0 < max_ratio < math.inf:
        problems.append(f"--max-ratio {max_ratio:g} is no limit for a ratio of losses; 1 is the base model's loss")
    if problems:
        raise ConfigError("This cannot be built:", problems)


def exporting(folder: Path, run: Run, checkpoint: str) -> None:
    """Refuse a run that is not finished, and a base that is not there.

    Args:
        checkpoint: what is exported instead of the finished adapter; empty for that.

    Raises:
        UserError: with everything that was found.
    """
    _all(*([] if checkpoint else [partial(finished_adapter, folder)]), partial(check_place, run.model.base))


def files(paths: Iterable[Path]) -> None:
    """Refuse adapters that are missing, damaged or pickled: their headers are read, no tensor is.

    Raises:
        UserError: with everything that was found.
    """
    _all(*(partial(open_sources, path) for path in paths))


def models(paths: Iterable[Path]) -> None:
    """The same for whole models: files, or folders that are there.

    Raises:
        UserError: with everything that was found.
    """
    _all(*(partial(read_header, path) for path in paths if not path.is_dir()))


def _all(*checks: Callable[[], object]) -> None:
    """Do all checks; what several refuse is told together, under the first one's exit code."""
    found: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        told = [" ".join((error.headline, "; ".join(error.problems))).strip() for error in found]
        raise type(found[0])("The command cannot start, for several reasons:", told)
