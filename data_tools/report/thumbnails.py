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
from data_tools.images import BLACK, WHITE, Color, read_picture
from data_tools.inspection import Progress
from data_tools.measuring import decode_again
from data_tools.pool import in_workers
from data_tools.quality import reduced

SIDES = ((60, 320), (300, 240), (1 << 62, 176))
"""(pictures, longer side in pixels): few pictures are shown larger."""
QUALITY = 72
VEIL, VEIL_SIDE = (90, 0, 20, 185), 128
BATCH = 64
"""Pictures made before the budget is looked at again."""


@dataclass
class Thumbnails:
    """Pictures as data addresses, by file name, and what they cost."""

    urls: dict[str, str] = field(default_factory=dict)
    veils: dict[str, str] = field(default_factory=dict)
    """What masks leave out, as pictures to be laid over; stretched to the thumbnail's size."""
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
        workers: how many decode at once; None: see `pool.count_of`.
        progress: called as (done, total), where the total is what the budget will probably hold.
    """
    side = next(side for count, side in SIDES if len(judged) <= count)
    wanted = _by_need(judged)
    made = Thumbnails()

    def work(each: Judged) -> tuple[str, str] | None:
        try:
            url = data_url(reduced(decode_again(root, each.record, background), side))
            return url, veil(root, each.record.mask_file) if each.record.mask_file else ""
        except RefusedError:
            return None

    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        for each, found in zip(part, in_workers(work, part, workers, lambda *_: None), strict=True):
            if found is not None and made.bytes + sum(map(len, found)) <= budget:
                made.urls[each.record.file_name] = found[0]
                made.veils |= {each.record.file_name: found[1]} if found[1] else {}
                made.bytes += sum(map(len, found))
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


def veil(root: Path, mask_file: str) -> str:
    """What a mask leaves out, as a small reddish picture with transparency.

    Raises:
        RefusedError: the mask cannot be read.
    """
    mask = reduced(read_picture(root / mask_file, BLACK).convert("L"), VEIL_SIDE)
    picture = Image.new("RGBA", mask.size, VEIL)
    picture.putalpha(mask.point([VEIL[3] * (255 - value) // 255 for value in range(256)]))
    return data_url(picture)


def data_url(image: Image.Image) -> str:
    """The picture as a data address that a page can hold."""
    file = BytesIO()
    image.save(file, format="WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
