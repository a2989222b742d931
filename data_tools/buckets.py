"""Aspect-ratio buckets: which picture is resized and cropped to which size. Pure arithmetic.

All sizes are (height, width) in pixels; only Pillow's `.size` and what is written as JSON are (width, height).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_tools.errors import DataToolsError, Problem, UsageError, counted, stop_for_errors
from data_tools.records import Focus, ImageRecord

Size = tuple[int, int]
Crop = Callable[[Size, Size], tuple[int, int]]
"""From the sizes of a resized picture and of its bucket to the (top, left) of the crop: `centred`, `around(...)`,
`slack(...)`."""
MANY_BUCKETS = 10_000
# (shorter, longer) side; both ways round are buckets. Source: SDXL paper, arXiv:2307.01952, appendix I, where
# 1344 x 704 stands in one direction only; Stability's own sampling code (generative-models) has it in both.
SDXL_SIDES = (
    (512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1664), (576, 1728), (576, 1792), (640, 1536),
    (640, 1600), (704, 1344), (704, 1408), (704, 1472), (768, 1280), (768, 1344), (832, 1152), (832, 1216),
    (896, 1088), (896, 1152), (960, 1024), (960, 1088), (1024, 1024),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placement:
    """How one picture becomes exactly one bucket's size: resize it, then cut the bucket out of it."""

    bucket: Size
    """(height, width) of the result."""
    resize: Size
    """(height, width) the whole picture is resized to; covers the bucket."""
    crop_top_left: tuple[int, int]
    """(top, left) of the bucket inside the resized picture, pixels."""
    lost: float
    """Share of the picture that is cropped away, 0 to 1."""

    @property
    def zoomed(self) -> bool:
        """Whether the picture is larger than it need be to cover the bucket, so that less of it is seen."""
        return self.resize[0] > self.bucket[0] and self.resize[1] > self.bucket[1]

    def as_json(self) -> dict[str, Any]:
        """Sizes as [width, height], the crop's corner as [left, top], pixels."""
        sizes = {"bucket": self.bucket, "resize": self.resize, "crop_left_top": self.crop_top_left}
        pairs = {name: [across, down] for name, (down, across) in sizes.items()}
        return {**pairs, "lost": round(self.lost, 6), "zoomed": self.zoomed}


@dataclass(frozen=True, slots=True)
class BucketRow:
    """One line of the bucket plan."""

    bucket: Size
    pictures: int
    samples: int
    """Pictures counted with their repeats."""
    mean_lost: float
    max_lost: float
    most_lost: str
    """The file that loses `max_lost`."""

    def as_json(self) -> dict[str, Any]:
        """With its `size` as [width, height], pixels."""
        values = asdict(self)
        return {"size": [*values.pop("bucket")][::-1], **values}


def make_buckets(
    resolution: int, multiple: int, min_side: int | None = None, max_side: int | None = None
) -> list[Size]:
    """All sizes of about resolution^2 pixels, and never more, whose sides are multiples of `multiple`.

    For each width the height is the largest multiple that keeps height x width <= resolution^2, and the other
    way round, so every bucket is less than one step short of the area.

    Args:
        resolution: side of the square bucket, pixels.
        multiple: step of both sides, pixels; the family's `bucket_multiple` or a multiple of it.
        min_side: shortest side; None means half the resolution.
        max_side: longest side; None means twice the resolution.

    Returns:
        (height, width) pairs, sorted by shape from tall to wide.

    Raises:
        UsageError: sizes that leave no bucket.

    Source: kohya sd-scripts `make_bucket_resolutions`; 1024 and 64 give sizes of the SDXL paper,
        arXiv:2307.01952, appendix I.
    """
    if multiple < 1 or resolution < multiple:
        raise UsageError(f"resolution={resolution} and multiple={multiple} leave no bucket; a side needs one multiple.")
    low = max(multiple, math.ceil((min_side or resolution / 2) / multiple) * multiple)
    high = (max_side or resolution * 2) // multiple * multiple
    square = resolution // multiple * multiple
    if not low <= square <= high:
        raise UsageError(
            f"min_side={min_side} and max_side={max_side} leave out the square of resolution={resolution} "
            f"in steps of {multiple}; widen them."
        )
    if (high - low) // multiple > MANY_BUCKETS:
        raise UsageError(f"resolution={resolution} in steps of {multiple} makes too many buckets; raise multiple.")
    sizes = {(square, square)}
    for side in range(low, high + 1, multiple):
        other = min(high, resolution**2 // side // multiple * multiple)
        if other >= low:
            sizes |= {(side, other), (other, side)}
    return _by_shape(sizes)


def _by_shape(sizes: Iterable[Size]) -> list[Size]:
    return sorted(set(sizes), key=lambda size: (size[1] / size[0], size))


def sdxl_paper() -> list[Size]:
    """The 41 sizes that Stable Diffusion XL was trained on, about 1024 x 1024 pixels in steps of 64."""
    return _by_shape(size for short, long in SDXL_SIDES for size in ((short, long), (long, short)))


PRESETS: dict[str, Callable[[], list[Size]]] = {
    "512": lambda: make_buckets(512, 64),
    "768": lambda: make_buckets(768, 64),
    "1024": lambda: make_buckets(1024, 64),
    "1024-step-16": lambda: make_buckets(1024, 16),
    "sdxl-paper": sdxl_paper,
}
"""Lists of buckets by name: the area's side and its usual step, or a published list."""


def preset(name: str) -> list[Size]:
    """The buckets of a name in `PRESETS`.

    Raises:
        UsageError: an unknown name.
    """
    if name not in PRESETS:
        raise UsageError(f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]()


def centred(resize: Size, bucket: Size) -> tuple[int, int]:
    """The middle of the picture, rounded towards the top left."""
    return (resize[0] - bucket[0]) // 2, (resize[1] - bucket[1]) // 2


def around(point: tuple[float, float]) -> Crop:
    """A crop whose middle is as near to a point as the picture's edges allow.

    Args:
        point: shares of the width from the left and of the height from the top, 0 to 1, as `ImageRecord.focus`.
    """

    def crop(resize: Size, bucket: Size) -> tuple[int, int]:
        shares = (point[1], point[0])
        top, left = (
            min(max(0, round(share * whole - part / 2)), whole - part)
            for share, whole, part in zip(shares, resize, bucket, strict=True)
        )
        return top, left

    return crop


def slack(across: float, down: float) -> Crop:
    """A crop at a share of the room it has: (0, 0) is the top left corner, (1, 1) the bottom right.

    With two uniform draws in [0, 1) every possible crop is equally likely: the random crop.
    """

    def crop(resize: Size, bucket: Size) -> tuple[int, int]:
        room = (resize[0] - bucket[0], resize[1] - bucket[1])
        return min(room[0], int(down * (room[0] + 1))), min(room[1], int(across * (room[1] + 1)))

    return crop


def move(placement: Placement, crop: Crop) -> Placement:
    """The same bucket and resize, cut out elsewhere."""
    return replace(placement, crop_top_left=crop(placement.resize, placement.bucket))


def assign(
    width: int,
    height: int,
    buckets: Sequence[Size],
    *,
    upscale: bool = False,
    multiple: int | None = None,
    crop: Crop = centred,
) -> Placement:
    """The bucket nearest in shape, and the resize and crop that lead to it.

    A picture smaller than that bucket is not enlarged unless `upscale`: its bucket's sides are then cut down
    to its own sides, rounded down to `multiple`, which is an extra bucket beside those given.

    Args:
        width, height: of the upright picture, pixels.
        buckets: (height, width) pairs.
        upscale: enlarge small pictures.
        multiple: step of an extra bucket, pixels; None means the greatest common divisor of all sides.
        crop: where the bucket is cut out.

    Raises:
        UsageError: no buckets.
        DataToolsError: a side is below one multiple and `upscale` is off.
    """
    return _cover(width, height, _nearest(width / height, width, height, buckets, upscale, multiple), crop)


def zoom(
    width: int,
    height: int,
    buckets: Sequence[Size],
    focus: Focus,
    *,
    upscale: bool = False,
    multiple: int | None = None,
) -> Placement:
    """The bucket nearest in shape to what a focus marks, and the resize and crop that fill it with that.

    All of the marked part is seen if a bucket has room for it, and beside it what fills the bucket. Where the part has
    too few pixels for that, more of its surroundings is seen instead, unless `upscale`.

    Args and Raises: as of `assign`; `focus` has a size.
    """
    left, right = max(0.0, focus.x - focus.width / 2), min(1.0, focus.x + focus.width / 2)
    top, bottom = max(0.0, focus.y - focus.height / 2), min(1.0, focus.y + focus.height / 2)
    wide, tall = (right - left) * width, (bottom - top) * height
    bucket = _nearest(wide / tall, width, height, buckets, upscale, multiple)
    crop = around(((left + right) / 2, (top + bottom) / 2))
    cover = _cover(width, height, bucket, crop)
    scale = min(bucket[0] / tall, bucket[1] / wide, math.inf if upscale else 1.0)
    resize = (round(scale * height), round(scale * width))
    if min(resize[0] - cover.resize[0], resize[1] - cover.resize[1]) <= 0:
        return cover
    return _cut(bucket, resize, crop)


def _nearest(
    shape: float, width: int, height: int, buckets: Sequence[Size], upscale: bool, multiple: int | None
) -> Size:
    """The bucket nearest to a shape (width / height) for a picture of that size; see `assign`."""
    if not buckets:
        raise UsageError("There are no buckets to choose from; make_buckets gives them.")
    step = multiple or math.gcd(*(side for bucket in buckets for side in bucket))
    wanted = math.log(shape)

    def distance(bucket: Size) -> tuple[float, bool, int]:
        fits = bucket[0] <= height and bucket[1] <= width
        area = bucket[0] * bucket[1]
        # keep: rounded, so that equal shapes tie in spite of the logarithm; the largest that fits is taken.
        return (round(abs(math.log(bucket[1] / bucket[0]) - wanted), 9), not fits, -area if fits or upscale else area)

    bucket = min(buckets, key=distance)
    if not upscale and (bucket[0] > height or bucket[1] > width):
        bucket = (min(bucket[0], height // step * step), min(bucket[1], width // step * step))
        if min(bucket) < 1:
            raise DataToolsError(
                f"A picture of {width} x {height} pixels is smaller than one step of {step}; remove it, or "
                "allow upscaling."
            )
    return bucket


def _cover(width: int, height: int, bucket: Size, crop: Crop) -> Placement:
    """The smallest resize that keeps the shape and covers the bucket, in whole numbers."""
    if bucket[1] * height >= bucket[0] * width:
        resize = (max(bucket[0], (2 * height * bucket[1] + width) // (2 * width)), bucket[1])
    else:
        resize = (bucket[0], max(bucket[1], (2 * width * bucket[0] + height) // (2 * height)))
    return _cut(bucket, resize, crop)


def _cut(bucket: Size, resize: Size, crop: Crop) -> Placement:
    return Placement(bucket, resize, crop(resize, bucket), 1 - bucket[0] * bucket[1] / (resize[0] * resize[1]))


def place(
    records: Iterable[ImageRecord], buckets: Sequence[Size], *, upscale: bool = False, multiple: int | None = None
) -> list[Placement]:
    """Every record's placement, in order: cropped around its `focus`, or zoomed to it; the others in the middle.

    Raises:
        DataToolsError: naming every picture that is too small.
    """
    placements, misfits = fit(records, buckets, upscale=upscale, multiple=multiple)
    stop_for_errors("These pictures fit no bucket:", misfits)
    return [placement for placement in placements if placement is not None]


def fit(
    records: Iterable[ImageRecord], buckets: Sequence[Size], *, upscale: bool = False, multiple: int | None = None
) -> tuple[list[Placement | None], list[Problem]]:
    """As `place`, with None for every picture that is too small, and why."""
    placements: list[Placement | None] = []
    misfits = []
    # keep: a million pictures have a few sizes, and to look through all buckets for each takes longer than all else.
    known: dict[tuple[object, ...], Placement | None] = {}
    for record in records:
        key = (record.width, record.height, record.focus)
        if key not in known:
            try:
                known[key] = _placed(record, buckets, upscale, multiple)
            except UsageError:
                raise
            except DataToolsError:
                known[key] = None
        placements.append(known[key])
        if known[key] is None:
            what = f"is {record.width} x {record.height} pixels, smaller than one step of the buckets"
            why, remedy = "training cannot show it", "remove it, or allow upscaling"
            misfits.append(Problem(record.file_name, what, why, remedy))
    return placements, misfits


def _placed(record: ImageRecord, buckets: Sequence[Size], upscale: bool, multiple: int | None) -> Placement:
    size, focus = (record.width, record.height), record.focus
    if focus is not None and focus.width:
        return zoom(*size, buckets, focus, upscale=upscale, multiple=multiple)
    crop = around(focus[:2]) if focus else centred
    return assign(*size, buckets, upscale=upscale, multiple=multiple, crop=crop)


def zoom_notes(records: Iterable[ImageRecord], placements: Iterable[Placement]) -> list[Problem]:
    """What to tell about pictures of which only a part is seen, on purpose; nothing where there is none."""
    zoomed = [(record, placement) for record, placement in zip(records, placements, strict=True) if placement.zoomed]
    if not zoomed:
        return []
    limited = sum(placement.resize == (record.height, record.width) for record, placement in zoomed)
    those = counted(len(zoomed), "picture is", "pictures are")
    what = f"{those} zoomed to their focus (focus_width and focus_height in the manifest)"
    remedy = "clear these columns to show all of a picture"
    if limited:
        what += f", {limited:,} of them only as far as their own pixels go"
        remedy += ", or allow upscaling to come nearer"
    return [Problem("", what, "the rest of the picture is not trained on", remedy, "note")]


def plan_table(records: Sequence[ImageRecord], placements: Sequence[Placement]) -> list[BucketRow]:
    """One row per bucket in use, from tall to wide; the `pictures` add up to the records."""
    groups = defaultdict(list)
    for record, placement in zip(records, placements, strict=True):
        groups[placement.bucket].append((record, placement.lost))
    rows = []
    for bucket, members in sorted(groups.items(), key=lambda item: (item[0][1] / item[0][0], item[0])):
        worst, max_lost = max(members, key=lambda member: member[1])
        mean = sum(lost for _, lost in members) / len(members)
        rows.append(
            BucketRow(
                bucket, len(members), sum(record.repeats for record, _ in members), mean, max_lost, worst.file_name
            )
        )
    return rows
