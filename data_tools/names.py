"""Parts of relative names, by plain string work: a folder of a million pictures asks millions of times."""

from __future__ import annotations

import unicodedata


def suffix(name: str) -> str:
    """The file ending in lower case, with its dot; empty for none and for hidden files."""
    dot = name.rfind(".")
    return name[dot:].lower() if name.rfind("/") + 1 < dot < len(name) - 1 else ""


def with_suffix(name: str, ending: str) -> str:
    """The name with another ending."""
    return name[: len(name) - len(suffix(name))] + ending


def stem(name: str) -> str:
    """The name without its ending, composed, so that companions may be spelled NFC and NFD."""
    dot = name.rfind(".")
    bare = name[:dot] if name.rfind("/") + 1 < dot < len(name) - 1 else name
    return bare if bare.isascii() else unicodedata.normalize("NFC", bare)
