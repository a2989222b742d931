"""What published files and texts must not give away: paths, the home folder, tokens."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")
SHORTEST_SECRET = 8
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.@~+-]+){2,}|(?<!\w)[A-Za-z]:\\|\\\\\w")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def public_name(base: str) -> str:
    """A base model's name without the folders it lies in; hub ids ("owner/name") stay whole."""
    is_path = base.startswith(("/", "~", ".")) or "\\" in base or base.count("/") > 1
    return PurePosixPath(base.replace("\\", "/")).name if is_path else base


def private_parts(text: str) -> list[str]:
    """What in a text should not leave this machine, in words: paths, the home folder, tokens."""
    home = str(Path.home())
    secrets = {
        name: value
        for name, value in os.environ.items()
        if any(part in name.upper() for part in SECRET_NAMES) and len(value) >= SHORTEST_SECRET
    }
    found = [
        f"the value of the environment variable {name}" for name, value in secrets.items() if value in text
    ]
    if HUB_TOKEN.search(text):
        found.append("a hub token")
    if len(home) > 1 and home in text:
        found.append("the home folder")
    elif match := ABSOLUTE_PATH.search(text):
        found.append(f"the path {match[0]}")
    return found
