"""What is known about one picture of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from data_tools.shelves import Packing, packing

Role = Literal["instance", "class"]
ROLES: tuple[str, ...] = get_args(Role)
Verdict = Literal["keep", "review", "drop"]


class Focus(NamedTuple):
    """What a crop looks at: shares of the picture's width from the left and of its height from the top, 0 to 1."""

    x: float
    y: float
    width: float = 0.0
    """What a crop zooms to around this point, as a share of the picture's width; 0: it does not zoom."""
    height: float = 0.0
    """The same as a share of the height; both are 0 or neither is."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture that is ready to be trained on, with its captions and fingerprints."""

    file_name: str
    """Path relative to the dataset folder, with forward slashes, spelled as on disk."""
    width: int
    """Pixels, upright: after the EXIF rotation."""
    height: int
    """Pixels, upright: after the EXIF rotation."""
    captions: tuple[str, ...]
    """One or more, each one line; training draws one of them each time. An empty one was warned about."""
    role: Role = "instance"
    """"instance" shows the subject; "class" only preserves what the model knows of its kind."""
    repeats: int = 1
    """How often the picture is seen in an epoch."""
    loss_weight: float = 1.0
    """What its loss is multiplied by in training; 0 or more."""
    sha256: str = ""
    """Of the file's bytes."""
    pixel_sha256: str = ""
    """Of the decoded upright sRGB pixels: equal for exact copies, whatever the file format."""
    phash: str = ""
    """64-bit perceptual hash, 16 hex digits: few bits differ between near copies."""
    mask_file: str | None = None
    """A picture of the same size that says where the loss counts; relative like `file_name`."""
    source: str = ""
    """Where the captions came from: sidecar, metadata, template, filename or kohya folder."""
    notes: tuple[str, ...] = ()
    """What the decoder did to make it plain RGB: rotated, composited, converted, first of several frames."""
    verdict: Verdict = "keep"
    """What `clean` or a person decided: "review" is trained on and deserves a look, "drop" is left out of training."""
    verdict_reasons: tuple[str, ...] = ()
    """Why, each with its number and threshold."""
    focus: Focus | None = None
    """What a crop keeps in its middle, and may zoom to."""


FOCUS: Packing = (tuple, lambda values: Focus(*values))
RECORD = packing(ImageRecord, focus=FOCUS)
"""How records are kept on a shelf."""
