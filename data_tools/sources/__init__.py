"""Where pictures come from before they are a folder here: one reader per kind of place, in one table."""

from __future__ import annotations

import shlex

from data_tools.errors import UsageError, shown
from data_tools.sources.archives import Archives
from data_tools.sources.base import File, Order, Source
from data_tools.sources.kohya_config import KohyaConfig
from data_tools.sources.tables import HUB, Hub, Parquet, Saved
from data_tools.sources.tree import Tree

__all__ = ["SOURCES", "File", "Order", "Source", "advice", "choose"]

SOURCES: dict[str, Source] = {
    "kohya_config": KohyaConfig(),
    "parquet": Parquet(),
    "archive": Archives(),
    "saved": Saved(),
    "folder": Tree(),
    "hub": Hub(),
}
"""The first that recognises a place reads it."""


def choose(place: str) -> tuple[str, Source]:
    """The source that reads a place, with its name.

    Raises:
        UsageError: none does.
    """
    for name, source in SOURCES.items():
        if source.recognises(place):
            return name, source
    kinds = "; ".join(source.summary for source in SOURCES.values())
    raise UsageError(f"{shown(place)} is not there, or nothing that can be imported. What can: {kinds}.")


def advice(place: str) -> str | None:
    """What to do with a place that is no folder of pictures; None where nothing can be imported from it."""
    others = (name for name, source in SOURCES.items() if name != "folder" and source.recognises(place))
    name = next(others, None)
    if name is None:
        return None
    command = f"`finetune data import {shlex.quote(shown(place))} -o photos` makes one of it, called photos."
    if name == "hub" and not place.startswith(HUB):
        return f"name the folder that holds the pictures; or, if it is a dataset of the hub: {command}"
    return command
