"""Small pictures for the page, as many as fit into a budget of bytes; the ones that need a look come first."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image

from data_tools.clean import Judged
from data_tools.errors import RefusedError
from data_tools.images import WHITE, Color
from data_tools.inspection import Progress
from data_tools.measuring import decode_again, in_threads
from data_tools.quality import reduced

SIDES = ((60, 320), (300, 240), (1 << 62, 176))
"""(pictures, longer side in pixels): few pictures are shown larger."""
QUALITY = 72
BATCH = 64
"""Pictures made before the budget is looked at again."""


@dataclass
class Thumbnails:
    """Pictures as data addresses, by file name, and what they cost."""

    urls: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


def make_thumbnails(
    root: Path,
    judged: Sequence[Judged],
    budget: int,
    *,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Thumbnails:
    """Thumbnails of the pictures that need a look, then of others evenly through the folder, within `budget` bytes.

    Args:
        root: the dataset folder.
        judged: its pictures.
        budget: bytes of all thumbnails together, as they stand in the page.
        background: red, green, blue shown where a picture is transparent.
        workers: threads that decode.
        progress: called as (done, total), where the total is what the budget will probably hold.
    """
    side = next(side for count, side in SIDES if len(judged) <= count)
    wanted = _by_need(judged)
    made = Thumbnails()

    def work(each: Judged) -> str | None:
        try:
            return data_url(decode_again(root, each.record, background), side)
        except RefusedError:
            return None

    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        for each, url in zip(part, in_threads(work, part, workers), strict=True):
            if url is not None and made.bytes + len(url) <= budget:
                made.urls[each.record.file_name] = url
                made.bytes += len(url)
        done = min(start + BATCH, len(wanted))
        if progress is not None:
            # keep: the budget usually ends this; how many pictures it holds is known from those made so far.
            progress(done, max(done, min(len(wanted), done * budget // max(1, made.bytes))))
        if made.bytes > 0.97 * budget:
            break
    return made


def _by_need(judged: Sequence[Judged]) -> list[Judged]:
    """Pictures with findings and those they are copies of, then the rest in strides, so that a part shows the whole."""
    originals = {each.copy.of for each in judged if each.copy is not None}
    first = [each for index, each in enumerate(judged) if each.findings or each.by_hand or index in originals]
    rest = [each for index, each in enumerate(judged) if not (each.findings or each.by_hand or index in originals)]
    strides = [rest[offset::8] for offset in (0, 4, 2, 6, 1, 5, 3, 7)]
    return [*first, *(each for stride in strides for each in stride)]


def data_url(image: Image.Image, side: int) -> str:
    """The picture reduced to `side` pixels, as a data address that a page can hold."""
    file = BytesIO()
    reduced(image, side).save(file, format="WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
