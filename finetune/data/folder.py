"""Whether there is a folder of pictures at all, and the run is not in it."""

from __future__ import annotations

from pathlib import Path

from data_tools import sources
from data_tools.images import SUFFIXES
from finetune.errors import ConfigError, DataError


def check_folder(field: str, folder: Path) -> None:
    """Tell before anything is loaded that there is no folder of pictures; archives and tables are imported first.

    Args:
        field: the knob that names it, such as data.folder.

    Raises:
        DataError: `folder` is none.
    """
    if not folder.is_dir():
        remedy = sources.advice(str(folder)) or "name the folder that holds the pictures."
        place = "" if folder.is_absolute() else f" (looked for at {folder.absolute()})"
        raise DataError(f"{field}={folder} is no folder of pictures{place}; {remedy}")
    if not any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*")):
        raise DataError(f"{field}={folder} holds no picture; name the folder that holds them.")


def check_output(output: Path, folder: Path) -> None:
    """What a run draws must not become what it learns from.

    Raises:
        ConfigError: the run's folder lies among the pictures.
    """
    if output.absolute().is_relative_to(folder.absolute()):
        raise ConfigError(
            f"output_dir={output} lies in data.folder={folder}, where the run's samples would be read as pictures; "
            "choose an output_dir beside it."
        )
