"""Masks for pictures that have none, written where training looks for them: masks/NAME.png for NAME.jpg.

White counts, black does not. A mask comes from a model that finds what words name, or from the picture's own
transparency. Masks are written batch by batch, so that a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_tools.beside import Todo, plan_files
from data_tools.errors import Problem, RefusedError
from data_tools.files import read_regular, storage_errors, write_atomic
from data_tools.folder import Listing
from data_tools.images import MAX_FILE_BYTES, decode, opacity
from data_tools.inspection import Progress
from data_tools.masks import FOLDER
from data_tools.names import with_suffix
from data_tools.pool import death, in_workers
from data_tools.processes import Share
from data_tools.quality import reduced

SIDE = 1024
"""Longer side of what is shown to a model, pixels; they read 350 to 640."""
CELL, COLUMNS = 240, 4
"""Of the sheet of masks: the side of a field in pixels, and the fields in a row."""
Chances = NDArray[np.float32]
"""How likely each place of a picture shows what is looked for: shape (h, w) over the whole picture, 0 to 1."""
Find = Callable[[Sequence[Image.Image]], list[Chances]]


@dataclass
class Done:
    """What came of it; written or not."""

    shares: dict[str, float] = field(default_factory=dict)
    """Picture -> share of it that counts."""
    small: dict[str, Image.Image] = field(default_factory=dict)
    """Picture -> itself, small, with what does not count darkened; only where a sheet is wanted."""
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Looking:
    """How masks are found."""

    find: Find | None
    """None: the picture's own transparency."""
    threshold: float = 0.5
    """A place counts from this likelihood on."""
    grow: float = 0.0
    """How far masks are widened, as a share of the picture's longer side."""
    batch: int = 8
    keep_small: bool = False


def plan(listing: Listing, named: Mapping[str, str], replace: bool, share: Share) -> Todo:
    """Look at what is there; a picture with a mask keeps it unless `replace`.

    Args:
        listing: the folder.
        named: picture -> mask as rows of the metadata say.
        replace: whether masks that lie where we write are made again.
        share: each process takes its own pictures.
    """
    there = {**listing.masks, **named}
    masks = set(there.values())

    def place(name: str) -> str | Problem:
        target = f"{FOLDER}/{with_suffix(name, '.png')}"
        other = there.get(name, target)
        if other == target:
            return target
        return Problem(name, f"has the mask {other}", f"only {target} is replaced", "remove what should not count")

    pictures = [name for name in listing.pictures if name not in masks]
    return plan_files(pictures, share, "mask", () if replace else there, place)


def make(listing: Listing, todo: Todo, looking: Looking, *, write: bool, progress: Progress | None = None) -> Done:
    """Find the masks of `todo.files`; with `write` each batch is on disk before the next one is begun.

    Raises:
        StorageError: a mask cannot be written; those before it are whole.
    """
    done = Done(problems=list(todo.problems))
    pictures = list(todo.files)
    for start in range(0, len(pictures), looking.batch):
        names = pictures[start : start + looking.batch]
        for name, mask, picture in _masks(listing.root, names, looking):
            if isinstance(mask, Problem):
                done.problems.append(mask)
                continue
            done.shares[name] = float(np.asarray(mask).mean() / 255)
            if looking.keep_small:
                done.small[name] = darkened(picture, mask)
            if write:
                _save(listing.root / todo.files[name], mask)
        if progress is not None:
            progress(start + len(names), len(pictures))
    return done


def _masks(root: Path, names: Sequence[str], looking: Looking) -> list[tuple[str, Image.Image | Problem, Image.Image]]:
    """Name, mask (L, as large as the upright picture) or why there is none, and the picture, small."""
    load = partial(_load, root, transparency=looking.find is None)
    loaded = list(in_workers(load, names, None, lambda name, code: (None, death(name, code))))
    shown = [picture for picture, _ in loaded if picture is not None]
    chances = iter(looking.find(shown) if looking.find is not None and shown else ())
    found: list[tuple[str, Image.Image | Problem, Image.Image]] = []
    for name, (picture, said) in zip(names, loaded, strict=True):
        if picture is None or isinstance(said, Problem):
            assert isinstance(said, Problem), "what is not refused was decoded"
            found.append((name, said, Image.new("RGB", (1, 1))))
            continue
        mask = said if isinstance(said, Image.Image) else shaped(next(chances), said, looking)
        found.append((name, mask if mask.getbbox() else _nothing(name), picture))
    return found


def _load(
    root: Path, name: str, *, transparency: bool
) -> tuple[Image.Image | None, Image.Image | tuple[int, int] | Problem]:
    """The picture, small; and its transparency or its full size (width, height); or why there is neither."""
    try:
        data = read_regular(root / name, MAX_FILE_BYTES)
        picture = decode(data)[0]
        if not transparency:
            return reduced(picture, SIDE), picture.size
        mask = opacity(data)
        if mask.getextrema() == (255, 255):
            return None, _opaque(name)
        return reduced(picture, SIDE), mask
    except RefusedError as refusal:
        return None, refusal.problem(name)


def _opaque(name: str) -> Problem:
    return Problem(
        name,
        "is opaque everywhere, so it gets no mask",
        "without one all of it counts",
        "cut the subject out, or give --of, if only a part should",
        "note",
    )


def shaped(chances: Chances, size: tuple[int, int], looking: Looking) -> Image.Image:
    """Likelihoods -> a black and white mask of `size` (width, height), with edges as smooth as the model saw them."""
    small = Image.fromarray((chances * 255).round().astype(np.uint8))
    reach = round(looking.grow * max(small.size))
    if reach:
        small = small.filter(ImageFilter.MaxFilter(2 * reach + 1))
    limit = looking.threshold * 255
    return small.resize(size, Image.Resampling.BICUBIC).point([255 * (value >= limit) for value in range(256)])


def _nothing(name: str) -> Problem:
    return Problem(
        name,
        "shows nothing of what is looked for, so it gets no mask",
        "with an all black one nothing of it would count; without one all of it does",
        "say it in other words (--of), give a lower --threshold, draw its mask by hand, or leave it out",
    )


def _save(path: Path, mask: Image.Image) -> None:
    file = BytesIO()
    mask.save(file, format="PNG", optimize=True)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, file.getvalue())


def darkened(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, small enough for a sheet, with the places that do not count darkened and reddish."""
    small = picture.copy()
    small.thumbnail((CELL - 16, CELL - 40))
    veil = Image.blend(small, Image.new("RGB", small.size, (90, 0, 20)), 0.75)
    return Image.composite(small, veil, mask.resize(small.size))


def sheet(done: Done) -> Image.Image:
    """All pictures of `done.small`, each with its name and the share that counts."""
    rows = -(-max(1, len(done.small)) // COLUMNS)
    canvas = Image.new("RGB", (CELL * min(COLUMNS, max(1, len(done.small))), CELL * rows), "#ffffff")
    pen = ImageDraw.Draw(canvas)
    for place, (name, picture) in enumerate(done.small.items()):
        left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
        canvas.paste(picture, (left + (CELL - picture.width) // 2, top + 8 + (CELL - 40 - picture.height) // 2))
        text = f"{name if len(name) <= 22 else '...' + name[-19:]}  {done.shares[name]:.0%}"
        pen.text((left + CELL // 2, top + CELL - 24), text, "#1c2733", ImageFont.load_default(14), anchor="ma")
    return canvas
