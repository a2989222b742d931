"""Charts as SVG: plain shapes and classes that the page's style sheet colours, so that they follow light and dark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from data_tools.errors import counted

WIDTH = 560
"""Of all charts, in units of their own; the page scales them."""
CELLS = 70
"""Cells per side of the size chart; pictures in one cell are one dot."""


@dataclass(frozen=True)
class Bins:
    """A histogram ready to draw."""

    labels: Sequence[str]
    """Under the bars; an empty one is left out."""
    counts: Sequence[int]
    limit: float | None = None
    """Where a line is drawn, in bars from the left."""
    limit_label: str = ""


def _tag(name: str, *inside: str, **attributes: object) -> Markup:
    """An SVG element; texts and values are escaped, numbers rounded, and `class_` is written class."""
    values = {
        key.rstrip("_").replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
        for key, value in attributes.items()
    }
    written = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in values.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(inside))


def _svg(height: float, label: str, parts: Iterable[str]) -> Markup:
    return _tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=label)


def histogram(bins: Bins, label: str) -> Markup:
    """Bars with their counts, and a dashed line at the limit."""
    top, bottom = 38, 160
    highest = max(bins.counts, default=0) or 1
    step = WIDTH / max(1, len(bins.counts))
    parts = []
    for place, (count, text) in enumerate(zip(bins.counts, bins.labels, strict=True)):
        size = (bottom - top) * count / highest
        middle = (place + 0.5) * step
        if count:
            title = _tag("title", f"{text}: {count}" if text else str(count))
            bar = {"x": place * step + 1.5, "y": bottom - size, "width": max(1.0, step - 3), "height": size}
            parts.append(_tag("rect", title, class_="bar", rx=2, **bar))
        if count and step > 22:
            parts.append(_tag("text", str(count), class_="value", x=middle, y=bottom - size - 5))
        if text:
            parts.append(_tag("text", text, class_="tick", x=middle, y=bottom + 18))
    parts.append(_tag("line", class_="axis", x1=0, x2=WIDTH, y1=bottom, y2=bottom))
    if bins.limit is not None:
        x = min(max(0.0, bins.limit), len(bins.counts)) * step
        late = x > WIDTH * 0.7
        parts.append(_tag("line", class_="limit", x1=x, x2=x, y1=8, y2=bottom))
        side = {"x": x - 6 if late else x + 6, "y": 16, "text_anchor": "end" if late else "start"}
        parts.append(_tag("text", bins.limit_label, class_="limit-label", **side))
    return _svg(190, label, parts)


def log_bins(values: Sequence[float], edges: Sequence[float], limit: float | None = None, words: str = "") -> Bins:
    """Counts between growing edges (and beyond them on both sides), labelled by the edges."""
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[sum(value >= edge for edge in edges)] += 1
    labels = [f"< {edges[0]:g}", *(f"{edge:g}+" for edge in edges)]
    return Bins(labels, counts, None if limit is None else _along(limit, edges), words)


def _along(limit: float, edges: Sequence[float]) -> float:
    """Where a value lies, in bars from the left; within a bar by its logarithm."""
    index = sum(limit >= edge for edge in edges)
    if index in (0, len(edges)) or limit <= 0:
        return float(index)
    low, high = edges[index - 1], edges[index]
    return index + math.log(limit / low) / math.log(high / low)


def linear_bins(values: Sequence[int], limit: float | None = None, words: str = "", bars: int = 24) -> Bins:
    """Counts of whole numbers from 0 on in at most `bars` bars of equal, round width."""
    highest = max([*values, int(limit or 0)], default=0)
    width = next(w * 10**p for p in range(9) for w in (1, 2, 5) if highest / (w * 10**p) < bars)
    counts = [0] * (highest // width + 1)
    for value in values:
        counts[value // width] += 1
    every = max(1, math.ceil(len(counts) / 10))
    labels = [str(place * width) if place % every == 0 else "" for place in range(len(counts))]
    # keep: a limit is the last number that is still good, so the line stands behind it.
    return Bins(labels, counts, None if limit is None else (limit + 1) / width, words)


SHAPES = ((1, 3), (9, 21), (1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1))
"""Width to height of the shapes people know; their mirror images follow."""


def shape_bins(ratios: Sequence[float]) -> Bins:
    """Width over height, from tall to wide, around the shapes people know."""
    shapes = [*SHAPES, *((tall, wide) for wide, tall in reversed(SHAPES[:-1]))]
    logs = [math.log(wide / tall) for wide, tall in shapes]
    counts = Counter(min(range(len(logs)), key=lambda place: abs(logs[place] - math.log(ratio))) for ratio in ratios)
    return Bins([f"{wide}:{tall}" for wide, tall in shapes], [counts[place] for place in range(len(shapes))])


@dataclass(frozen=True)
class _Axes:
    """Two equal logarithmic axes in powers of two."""

    low: int
    span: float
    left: float = 52.0
    bottom: float = 360.0

    def at(self, width: float, tall: float) -> tuple[float, float]:
        """Where a size lies on the chart."""
        across, up = (math.log2(side / self.low) / self.span for side in (width, tall))
        return self.left + (WIDTH - self.left - 14) * across, self.bottom - (self.bottom - 14) * up

    def cell(self, side: int) -> int:
        """Which of `CELLS` a side falls into."""
        return round(CELLS * math.log2(side / self.low) / self.span)

    def middle(self, cell: int) -> float:
        """The side that a cell stands for, pixels."""
        return float(self.low * 2 ** (self.span * cell / CELLS))


def size_chart(pictures: Sequence[dict[str, Any]], buckets: Sequence[dict[str, Any]]) -> Markup:
    """Width against height on logarithmic axes: dots are pictures, larger for more, squares are the buckets in use."""
    sides = [side for thing in (*pictures, *buckets) for side in thing["size"]] or [64, 2048]
    low = 2 ** math.floor(math.log2(min(sides)))
    axes = _Axes(low, max(1, math.ceil(math.log2(max(sides) / low))))
    parts = _grid(axes)
    cells = Counter(
        (axes.cell(picture["size"][0]), axes.cell(picture["size"][1]), picture["verdict"]) for picture in pictures
    )
    for (across, up, verdict), count in cells.items():
        width, tall = axes.middle(across), axes.middle(up)
        x, y = axes.at(width, tall)
        title = _tag("title", f"about {width:.0f} x {tall:.0f}: {count}")
        parts.append(_tag("circle", title, class_=f"dot {verdict}", cx=x, cy=y, r=min(16, 3 + 1.2 * math.sqrt(count))))
    for bucket in buckets:
        x, y = axes.at(*bucket["size"])
        title = _tag("title", "bucket {} x {}".format(*bucket["size"]))
        parts.append(_tag("rect", title, class_="bucket", x=x - 4, y=y - 4, width=8, height=8))
    parts.append(_tag("text", "width, pixels (up: height)", class_="tick", x=WIDTH / 2, y=396))
    return _svg(400, "Sizes of the pictures: width against height", parts)


def _grid(axes: _Axes) -> list[Markup]:
    parts = []
    for power in range(int(axes.span) + 1):
        side = axes.low * 2**power
        x, y = axes.at(side, side)
        parts.append(_tag("line", class_="grid", x1=x, x2=x, y1=14, y2=axes.bottom))
        parts.append(_tag("line", class_="grid", x1=axes.left, x2=WIDTH - 14, y1=y, y2=y))
        parts.append(_tag("text", str(side), class_="tick", x=x, y=axes.bottom + 18))
        parts.append(_tag("text", str(side), class_="tick end", x=axes.left - 8, y=y + 4))
    (x1, y1), (x2, y2) = axes.at(axes.low, axes.low), axes.at(side, side)
    return [*parts, _tag("line", class_="diagonal", x1=x1, y1=y1, x2=x2, y2=y2)]


def bucket_chart(buckets: Sequence[dict[str, Any]]) -> Markup:
    """One line per bucket: its shape to scale, how many samples it holds, how much is cropped away."""
    row, box = 38, 30
    longest = max((max(bucket["size"]) for bucket in buckets), default=1)
    most = max((bucket["samples"] for bucket in buckets), default=1)
    parts = []
    for place, bucket in enumerate(buckets):
        middle = row * (place + 0.5)
        width, tall = (max(2.0, side / longest * box) for side in bucket["size"])
        size = max(2.0, 250 * bucket["samples"] / most)
        shape = "shape small" if bucket["small"] else "shape"
        words = f"{bucket['samples']:,} · {bucket['mean_lost']:.1%} cropped"
        worst = f"at most {bucket['max_lost']:.1%} cropped, in {bucket['most_lost']}"
        parts.append(
            _tag(
                "g",
                _tag("title", f"{counted(bucket['pictures'], 'picture')}; {worst}"),
                _tag("rect", class_=shape, x=16 - width / 2, y=middle - tall / 2, width=width, height=tall),
                _tag("text", "{} x {}".format(*bucket["size"]), class_="name", x=44, y=middle + 5),
                _tag("rect", class_="bar", x=146, y=middle - 9, width=size, height=18, rx=2),
                _tag("text", words, class_="note", x=154 + size, y=middle + 5),
            )
        )
    return _svg(row * max(1, len(buckets)), "Samples per bucket", parts)
