"""What is known about one picture of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["instance", "class"]
ROLES: tuple[str, ...] = get_args(Role)
Verdict = Literal["keep", "review", "drop"]


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
    focus: tuple[float, float] | None = None
    """What a crop keeps in its middle: shares of the width from the left and of the height from the top, 0 to 1."""
