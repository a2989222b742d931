"""What a source of pictures is asked, and what it gives: files on their way into a new dataset folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import Problem


@dataclass(frozen=True)
class Order:
    """What the user asked to import."""

    place: str
    """A path, or the id of a dataset on the hub."""
    split: str = "train"
    """Part of a hub dataset."""
    image_column: str | None = None
    """Column of a table that holds the pictures; None finds it."""
    text_column: str | None = None
    """Column of a table that holds the captions; None finds it."""

    @property
    def path(self) -> Path:
        """The place as a path; it need not exist."""
        return Path(self.place).expanduser()


@dataclass(frozen=True)
class File:
    """One file for the new folder."""

    name: str
    """Relative to the new folder, with forward slashes. Whoever writes it confines it to the folder."""
    content: bytes | Path
    """Its bytes, or the file to copy."""
    columns: dict[str, Any] | None = None
    """Its row of the metadata; None for files that go along: captions, masks, metadata of the source itself."""


class Source(Protocol):
    """A kind of place that pictures come from."""

    summary: str
    """What a user calls it, for the help page."""

    def recognises(self, place: str) -> bool:
        """Whether this source can read the place; looks at names and first bytes only."""
        ...

    def read(self, order: Order) -> Iterator[File | Problem]:
        """Every file in turn, streamed, in a fixed order; what is left out is a problem with its reason.

        Raises:
            DataToolsError: the place as a whole cannot be used, or is refused for safety; nothing was given yet.
        """
        ...
