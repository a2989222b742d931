"""How many tokens a caption becomes, and how many of them a text encoder reads."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from data_tools.errors import UsageError, shown
from data_tools.hub import only_fetched

NAMES = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""Sub-folders of a diffusers model; each text encoder has its own."""
CLIP_ROOM = 77
DEMO = "demo"


@dataclass(frozen=True)
class Tokenizer:
    """Counts the tokens of captions."""

    count: Callable[[str], int]
    """Tokens of a caption, those that mark its start and end included."""
    room: int
    """Tokens that the encoder reads; the rest has no effect."""


Tokenizers = Mapping[str, Tokenizer]


def load_tokenizers(place: str) -> Tokenizers:
    """The tokenizers of a model, by name: tokenizer, tokenizer_2, ...

    Args:
        place: a tokenizer.json, a folder that holds one, a folder of a diffusers model, a hub id (which may be looked
            up in the network), or demo: the toolkit's embedded base, where it is installed beside this package.

    Raises:
        UsageError: there is no tokenizer that can be read.
    """
    path = _demo() if place == DEMO else Path(place)
    if path.is_file():
        return {path.stem: _from_file(path)}
    if path.is_dir():
        folders = [path / name for name in NAMES if (path / name).is_dir()] or [path]
        return {folder.name: _from_folder(folder) for folder in folders}
    if place.count("/") == 1 and not place.startswith((".", "/", "~")):
        return _from_hub(place)
    raise UsageError(
        f"--tokenizer {shown(place)} is neither a file, a folder nor a hub id; give a tokenizer.json, or the folder "
        "of the base model."
    )


def _demo() -> Path:
    toolkit = find_spec("finetune")
    folder = Path(toolkit.origin).parent / "demo" / "base" if toolkit and toolkit.origin else None
    if folder is None or not folder.is_dir():
        raise UsageError("--tokenizer demo: the toolkit's embedded base is not installed; give a folder or a hub id.")
    return folder


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _from_file(folder / "tokenizer.json")
    return _through_transformers(str(folder), subfolder="")


def _from_file(path: Path) -> Tokenizer:
    """Read tokenizer.json directly: no torch, no network."""
    tokenizers = importlib.import_module("tokenizers")
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UsageError(
            f"--tokenizer {shown(str(path))} cannot be read ({error}); give the folder of the base model."
        ) from error
    loaded.no_truncation()
    loaded.no_padding()
    return Tokenizer(lambda text: len(loaded.encode(text).ids), _room(path.parent))


def _room(folder: Path) -> int:
    try:
        room = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return CLIP_ROOM
    return int(room) if isinstance(room, int | float) and 0 < room < 10**6 else CLIP_ROOM


def _from_hub(name: str) -> Tokenizers:
    """All tokenizers of a base model; or that of a text encoder, at the top."""
    try:
        found = {NAMES[0]: _through_transformers(name, subfolder=NAMES[0])}
    except UsageError:
        return {NAMES[0]: _through_transformers(name, subfolder="")}
    for folder in NAMES[1:]:
        with contextlib.suppress(UsageError):
            found[folder] = _through_transformers(name, subfolder=folder)
    return found


def _through_transformers(place: str, subfolder: str) -> Tokenizer:
    auto = importlib.import_module("transformers").AutoTokenizer
    try:
        loaded = auto.from_pretrained(
            place, subfolder=subfolder, trust_remote_code=False, local_files_only=only_fetched(place)
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--tokenizer {shown(place)}: no tokenizer can be loaded ({str(error).splitlines()[0]}); give a folder "
            "that holds tokenizer.json, or the folder of the base model."
        ) from error
    room = loaded.model_max_length
    return Tokenizer(lambda text: len(loaded(text, truncation=False).input_ids), room if room < 10**6 else CLIP_ROOM)
