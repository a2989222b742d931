"""Where a base model lies, judged by its name alone: nothing is loaded, fetched or imported that takes time."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.demo import BASE_DIR
from finetune.errors import ConfigError, UnsafeError
from finetune.header import PICKLED

DEMO = "demo"
"""The name of the embedded base model."""
FILE = ".safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""owner/name"""


def names_folder(base: str) -> Path | None:
    """The folder whose configurations name a base's layers, if it is on this disk under that name; never fetched."""
    folder = BASE_DIR if base == DEMO else Path(base).expanduser()
    return folder if folder.is_dir() else None


def check_place(base: str) -> None:
    """Refuse a name under which there can be no base.

    Args:
        base: demo, a diffusers folder, a .safetensors file or a hub id, which may or may not exist.

    Raises:
        ConfigError: if there is nothing of that name here and it is no hub id, or it is no base.
        UnsafeError: for a pickled checkpoint.
    """
    path = Path(base).expanduser()
    if base == DEMO:
        return
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(
                f"model.base={base} is a folder without model_index.json, so it is no diffusers pipeline folder; "
                "name the folder that save_pretrained wrote, or the .safetensors file itself."
            )
    elif path.suffix in PICKLED:
        raise UnsafeError(
            f"model.base={base} is a pickled checkpoint, which can run code when opened, so it is not opened here; "
            "get the .safetensors of the same model, or convert it on a machine you can afford to lose."
        )
    elif path.is_file():
        if path.suffix != FILE:
            raise ConfigError(f"model.base={base} is a {path.suffix or 'nameless'} file; only .safetensors are read.")
    elif path.suffix == FILE or not HUB_ID.fullmatch(base):
        raise ConfigError(
            f"model.base={base} is neither a folder nor a file here, nor a hub id, which has the form owner/name; "
            "check the spelling, or write demo for the embedded base."
        )
