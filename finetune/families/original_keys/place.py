"""Where a tensor stands in an original file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where one of our tensors stands in an original file.

    Attributes:
        name: of the tensor in the file, without the network's prefix.
        part: which of several of our tensors it is that the file holds on top of each other (a fused q, k, v).
        form: "same", or how the two differ: a key of OUTWARDS; "identity" for a matrix that files leave out.
    """

    name: str
    part: int = 0
    form: str = "same"
