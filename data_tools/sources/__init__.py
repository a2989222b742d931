"""Where pictures come from before they are a folder here: one reader per kind of place, in one table."""

from __future__ import annotations

from data_tools.errors import UsageError, shown
from data_tools.sources.archives import Archives
from data_tools.sources.base import File, Order, Source
from data_tools.sources.kohya_config import KohyaConfig
from data_tools.sources.tables import Hub, Parquet, Saved
from data_tools.sources.tree import Tree

__all__ = ["SOURCES", "File", "Order", "Source", "choose"]

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
