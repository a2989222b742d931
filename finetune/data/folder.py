"""Whether there is a folder of pictures at all."""

from __future__ import annotations

from pathlib import Path

from data_tools import sources
from data_tools.images import SUFFIXES
from finetune.errors import DataError


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
