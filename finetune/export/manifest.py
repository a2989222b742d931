"""The list of files a build made, so that anyone can check them."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from finetune import storage

NAME = "manifest.json"


def write_manifest(folder: Path) -> Path:
    """Write `manifest.json` with the size and SHA-256 of every file below the folder, in order of name.

    Files whose name starts with a dot (other programs' and unfinished ones) and the manifest itself are left
    out.

    Returns:
        the manifest's path.
    """
    files = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and parts != (NAME,) and not any(part.startswith(".") for part in parts):
            files["/".join(parts)] = {"bytes": file.stat().st_size, "sha256": storage.sha256_file(file)}
    path = folder / NAME
    storage.write_json(path, {"version": 1, "files": files})
    return path


def check_manifest(folder: Path, edited: Container[str] = ()) -> list[str]:
    """What no longer agrees with the folder's manifest, in words; empty if all is well.

    Args:
        edited: names of files whose content does not matter.
    """
    listed = storage.read_json(folder / NAME)["files"]
    problems = []
    for name, facts in listed.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing.")
        elif name in edited:
            continue
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes and should have {facts['bytes']}.")
        elif storage.sha256_file(file) != facts["sha256"]:
            problems.append(f"{name} has other content than when it was listed.")
    return problems
