"""A folder as it is: pictures, caption files, masks and metadata, copied with their layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import Problem
from data_tools.folder import list_folder
from data_tools.sources.base import File, Order


class Tree:
    """Pictures in folders: plain, kohya's `10_name`, with caption files, or an imagefolder with metadata."""

    summary = "a folder of pictures (caption files, kohya folders, metadata.jsonl)"

    def recognises(self, place: str) -> bool:
        """Any folder."""
        return Path(place).expanduser().is_dir()

    def read(self, order: Order) -> Iterator[File | Problem]:
        """Each file that a scan would read."""
        listing = list_folder(order.path)
        yield from listing.problems
        masks = dict.fromkeys(listing.masks.values())
        for name in (*listing.metadata, *listing.pictures, *masks, *listing.sidecars):
            yield File(name, listing.root / name)
