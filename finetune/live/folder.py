"""What a run folder says about its run at this moment."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

RECENT_SECONDS = 600.0
"""A run of another machine that wrote its log so recently is taken to be running."""
SHEET = "samples/step-*/questions.json"
"""Written after the last picture of a sheet."""


def lines_since(folder: Path, mark: str) -> tuple[str, bool, list[Any]]:
    """Lines of metrics.jsonl that were added after `mark`.

    A run that goes on replaces its log, because the lines of lost steps go; then everything is given anew.

    Args:
        mark: what the last call gave, or an empty text.

    Returns:
        the next mark; whether the lines are all there are, and earlier ones must be forgotten; the lines, parsed.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as stream:
            status = os.fstat(stream.fileno())
            file, _, place = mark.partition("-")
            fresh = file != str(status.st_ino) or not place.isdecimal() or int(place) > status.st_size
            start = 0 if fresh else int(place)
            stream.seek(start)
            text = stream.read()
    except FileNotFoundError:
        return "", True, []
    whole = text[: text.rfind(b"\n") + 1]
    return f"{status.st_ino}-{start + len(whole)}", fresh, [json.loads(line) for line in whole.splitlines() if line]


def status_of(folder: Path) -> dict[str, Any]:
    """What the run is, and whether it waits, prepares, trains, stopped or is finished."""
    run = _document(folder / "run.json")
    adapter, train = run.get("adapter") or {}, run.get("train", {})
    facts = {
        "base": run.get("model", {}).get("base"),
        "pictures": run.get("data", {}).get("folder"),
        "adapter": f"{adapter['method']}, rank {adapter['rank']}" if adapter else None,
        "optimizer": run.get("optimizer", {}).get("name"),
        "seed": train.get("seed"),
    }
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "phase": _phase(folder, bool(run)),
        "steps": train.get("steps"),
        "facts": {key: str(value) for key, value in facts.items() if value is not None},
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "sheets": _sheets(folder),
    }


def _phase(folder: Path, known: bool) -> str:
    log, result = _changed(folder / "metrics.jsonl"), _changed(folder / "adapter.safetensors")
    if log and result >= log:
        return "finished"
    if _running(folder, log):
        return "training" if log else "preparing"
    return "stopped" if known else "waiting"


def _running(folder: Path, log: float) -> bool:
    """Whether the process that wrote the lock lives; the lock itself is not touched, for a run may be about to take
    it."""
    holder = _document(folder / ".lock")
    if holder.get("host") != socket.gethostname():
        return time.time() - log < RECENT_SECONDS
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """Whole sample sheets by step: where they lie, when they were made, and what was asked."""
    found = []
    for path in sorted(folder.glob(SHEET)):
        asked = _document(path)
        found.append(
            {
                "step": int(path.parent.name.removeprefix("step-")),
                "folder": f"samples/{path.parent.name}",
                "made": int(_changed(path)),
                "prompts": asked.get("prompts", []),
                "per_prompt": asked.get("per_prompt", 0),
            }
        )
    return found


def _changed(path: Path) -> float:
    """When a file was written last, in seconds since 1970; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _document(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none yet."""
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
