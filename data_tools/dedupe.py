"""Copies of pictures: exact ones by their pixels, near ones by perceptual hash and colours, mirrored ones too.

100,000 pictures are compared in seconds: a pair within d bits agrees in one quarter of the hash up to d // 4 bits,
so only pictures that share such a quarter are compared at all (multi-index hashing, Norouzi et al. 2012,
arXiv:1307.2982).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UsageError
from data_tools.quality import GRID, Measures
from data_tools.records import ImageRecord

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

MAX_DISTANCE = 12
"""Bits; beyond, other pictures come as near, and the search takes minutes."""
MAX_COLOR_STEP = 48
"""Levels of 255 by which any of the 4 x 4 fields of a near copy may differ in any colour: the hash sees no colours."""
QUARTERS = tuple((16 * part, 16) for part in range(4))
"""First bit and width of the parts of a hash."""
THIRDS = ((0, 21), (21, 21), (42, 22))
THIRDS_REACH = 5
"""Bits up to which two hashes agree in a third but for one bit."""
MANY = 50_000
AT_ONCE = 4_000_000
"""Pairs compared at once, to bound memory (about 200 MB)."""
_BIT_COUNTS = np.array([value.bit_count() for value in range(2**16)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Copy:
    """A picture that shows what another one shows."""

    index: int
    of: int
    """Index of the picture that is kept in its place."""
    distance: int
    """Bits of 64 in which the perceptual hashes differ; 0 for exact copies as well."""
    exact: bool
    """Every pixel is the same."""
    mirrored: bool = False
    """It is the other one's mirror image."""


def to_hashes(digits: Iterable[str]) -> Hashes:
    """Perceptual hashes written as 16 hex digits -> numbers."""
    return np.fromiter((int(text or "0", 16) for text in digits), dtype=np.uint64)


def distances(left: Hashes, right: Hashes) -> NDArray[np.uint8]:
    """Number of bits in which hashes differ, element by element."""
    differ = left ^ right
    parts = [_BIT_COUNTS[(differ >> np.uint64(first)) & np.uint64(0xFFFF)] for first, _ in QUARTERS]
    return parts[0] + parts[1] + parts[2] + parts[3]


@dataclass(frozen=True)
class Looks:
    """What of n pictures is compared."""

    straight: Hashes
    """Perceptual hashes; shape (n,)."""
    turned: Hashes
    """Those of the mirrored pictures; shape (n,)."""
    colors: NDArray[np.int16]
    """Mean colours of fields; shape (n, rows, columns, 3)."""

    @classmethod
    def of(cls, records: Sequence[ImageRecord], measures: Sequence[Measures]) -> Looks:
        """Read them from where they are kept as text."""
        return cls(
            to_hashes([record.phash for record in records]),
            to_hashes([each.phash_mirrored for each in measures]),
            _colors([each.colors for each in measures]),
        )

    def at(self, places: Indices) -> Looks:
        """Those of some of the pictures."""
        return Looks(self.straight[places], self.turned[places], self.colors[places])


def near_pairs(
    left: Looks, right: Looks, distance: int, mirrored: bool = False
) -> tuple[Indices, Indices, NDArray[np.uint8]]:
    """All (i, j, bits) where left[i] and right[j] have like colours and hashes at most `distance` bits apart.

    Each pair comes once, in order. With `mirrored`, left[i] is compared with the mirror image of right[j].

    Raises:
        UsageError: a distance outside of 0 to `MAX_DISTANCE`.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise UsageError(f"A distance of {distance} bits cannot be searched; give 0 to {MAX_DISTANCE}.")
    mine, theirs = left.straight, right.turned if mirrored else right.straight
    colors = right.colors[:, :, ::-1] if mirrored else right.colors
    found = [np.empty(0, dtype=np.int64)]
    # keep: in many pictures too many share a quarter; a third (21 or 22 bits) has to be as near only up to 5 bits.
    parts = THIRDS if distance <= THIRDS_REACH and len(theirs) > MANY else QUARTERS
    for first, width in parts:
        shift, mask = np.uint64(first), np.uint64(2**width - 1)
        wanted = ((mine >> shift) & mask).astype(np.int64)
        keys = ((theirs >> shift) & mask).astype(np.int64)
        by_key = np.argsort(keys, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=2**width))])
        for flip in _flips(distance // len(parts), width):
            flipped = wanted ^ flip
            for some_i, some_j in _expanded(starts[flipped], starts[flipped + 1], by_key):
                near = distances(mine[some_i], theirs[some_j]) <= distance
                i, j = some_i[near], some_j[near]
                alike = _alike(left.colors, colors, i, j)
                found.append(i[alike] * len(theirs) + j[alike])
    pairs = np.unique(np.concatenate(found))
    i, j = (pairs // max(1, len(theirs)), pairs % max(1, len(theirs)))
    return i, j, distances(mine[i], theirs[j])


def _flips(bits: int, width: int) -> Iterator[int]:
    """All numbers of `width` bits with at most `bits` ones."""
    for count in range(bits + 1):
        for places in combinations(range(width), count):
            yield sum(1 << place for place in places)


def _expanded(first: Indices, last: Indices, order: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Ranges of the sorted right side, per left element, as pairs of indices; at most about `AT_ONCE` at a time."""
    counts = last - first
    chunk = np.cumsum(counts) // AT_ONCE
    for start, stop in _runs(chunk):
        part = counts[start:stop]
        total = int(part.sum())
        if total == 0:
            continue
        i = np.repeat(np.arange(start, stop), part)
        within = np.arange(total) - np.repeat(np.cumsum(part) - part, part)
        yield i, order[np.repeat(first[start:stop], part) + within]


def _runs(values: NDArray[np.integer[Any]]) -> Iterator[tuple[int, int]]:
    """Stretches of equal values, as (start, stop)."""
    if len(values):
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        yield from pairwise(edges)


def find_copies(
    records: Sequence[ImageRecord], measures: Sequence[Measures], distance: int, rank: Sequence[int] | None = None
) -> list[Copy]:
    """Which pictures show what a better one shows; everything else is left as it is.

    Of a group the picture with the lowest rank stays, then the one with the most pixels, the sharpest, the first by
    order. Every copy lies within `distance` of the one that stays: likeness is not passed on from copy to copy.

    Args:
        records: the pictures; `pixel_sha256` and `phash` are compared.
        measures: theirs, in the same order.
        distance: bits of 64 by which the hashes of near copies differ at most; -1 looks for exact copies only.
        rank: preference, lower is better, for example of what a person decided to keep.
    """
    ranks = rank or [0] * len(records)
    order = sorted(
        range(len(records)),
        key=lambda i: (ranks[i], -records[i].width * records[i].height, -_crispness(measures[i]), i),
    )
    exact: dict[str, int] = {}
    copies: list[Copy] = []
    leaders: list[int] = []
    for index in order:
        leader = exact.setdefault(records[index].pixel_sha256, index)
        if leader == index:
            leaders.append(index)
        else:
            copies.append(Copy(index, leader, 0, exact=True))
    if distance >= 0:
        copies += _near(leaders, records, measures, distance)
    return sorted(copies, key=lambda copy: copy.index)


def _crispness(measures: Measures) -> int:
    """Sharpness in doublings: mirroring and re-saving change it by a few percent, blur by much more."""
    return round(math.log2(1 + measures.sharpness))


def _near(
    leaders: list[int], records: Sequence[ImageRecord], measures: Sequence[Measures], distance: int
) -> list[Copy]:
    """Near copies among pictures that are no exact copies, given best first."""
    looks = Looks.of([records[i] for i in leaders], [measures[i] for i in leaders])
    same = _same_hash(looks)
    unlike = np.array([place for place in range(len(leaders)) if place not in same], dtype=np.int64)
    copies = [Copy(leaders[place], leaders[of], 0, exact=False) for place, of in same.items()]
    i, j, bits, mirrored = _linked(looks.at(unlike), distance)
    starts = np.searchsorted(i, np.arange(len(unlike) + 1))
    taken = np.zeros(len(unlike), dtype=bool)
    for place in range(len(unlike)):
        part = slice(starts[place], starts[place + 1])
        if taken[place] or part.start == part.stop:
            continue
        free = ~taken[j[part]]
        taken[j[part][free]] = True
        for other, apart, turned in zip(j[part][free], bits[part][free], mirrored[part][free], strict=True):
            copies.append(
                Copy(leaders[unlike[other]], leaders[unlike[place]], int(apart), exact=False, mirrored=bool(turned))
            )
    return _to_the_kept(copies)


def _same_hash(looks: Looks) -> dict[int, int]:
    """{place: an earlier place with the very same hash and like colours}; keeps long stills from making n^2 pairs."""
    same: dict[int, int] = {}
    order = np.argsort(looks.straight, kind="stable")
    for start, stop in _runs(looks.straight[order]):
        rest = order[start:stop]
        while len(rest) > 1:
            first, others = rest[0], rest[1:]
            alike = _alike(looks.colors, looks.colors, np.full(len(others), first), others)
            same |= {int(other): int(first) for other in others[alike]}
            rest = others[~alike]
    return same


def _linked(looks: Looks, distance: int) -> tuple[Indices, Indices, NDArray[np.uint8], NDArray[np.bool_]]:
    """Pairs i < j of like pictures, each once and the shorter way of the two (straight or mirrored), sorted."""
    found = []
    for mirrored in (False, True):
        i, j, bits = near_pairs(looks, looks, distance, mirrored)
        low, high, ahead = np.minimum(i, j), np.maximum(i, j), i != j
        found.append((low[ahead], high[ahead], bits[ahead], np.full(int(ahead.sum()), mirrored)))
    i, j, bits, turned = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((turned, bits, j, i))
    i, j, bits, turned = i[order], j[order], bits[order], turned[order]
    new = np.ones(len(i), dtype=bool)
    new[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
    return i[new], j[new], bits[new], turned[new]


def _to_the_kept(copies: list[Copy]) -> list[Copy]:
    """A copy of a copy becomes a copy of the picture that stays; possible only among equal hashes."""
    of = {copy.index: copy for copy in copies}
    return [
        copy if copy.of not in of else replace(copy, of=of[copy.of].of, distance=of[copy.of].distance,
                                               mirrored=of[copy.of].mirrored)
        for copy in copies
    ]  # fmt: skip


def find_shared(
    records: Sequence[ImageRecord],
    measures: Sequence[Measures],
    others: Sequence[ImageRecord],
    their_measures: Sequence[Measures],
    distance: int,
) -> list[Copy]:
    """Which of `records` show what one of `others` shows (`of` is an index into `others`), the nearest one each."""
    pixels = {record.pixel_sha256: i for i, record in reversed(list(enumerate(others)))}
    found: dict[int, Copy] = {
        i: Copy(i, pixels[record.pixel_sha256], 0, exact=True)
        for i, record in enumerate(records)
        if record.pixel_sha256 in pixels
    }
    if distance >= 0 and records and others:
        mine, theirs = Looks.of(records, measures), Looks.of(others, their_measures)
        for mirrored in (False, True):
            i, j, bits = near_pairs(mine, theirs, distance, mirrored)
            for a, b, d in zip(i.tolist(), j.tolist(), bits.tolist(), strict=True):
                known = found.get(a)
                if known is None or (not known.exact and d < known.distance):
                    found[a] = Copy(a, b, d, exact=False, mirrored=mirrored)
    return [found[i] for i in sorted(found)]


def _colors(digits: Sequence[str]) -> NDArray[np.int16]:
    """Colour fields written as hex digits -> (n, rows, columns, 3)."""
    flat = np.frombuffer(bytes.fromhex("".join(digits)), dtype=np.uint8)
    return flat.reshape(len(digits), GRID, GRID, 3).astype(np.int16)


def _alike(left: NDArray[np.int16], right: NDArray[np.int16], i: Indices, j: Indices) -> NDArray[np.bool_]:
    """Whether the colours of each pair agree, field by field."""
    alike = np.ones(len(i), dtype=bool)
    for start in range(0, len(i), AT_ONCE // 48):
        part = slice(start, start + AT_ONCE // 48)
        step = np.abs(left[i[part]] - right[j[part]])
        alike[part] = step.reshape(len(step), -1).max(axis=1, initial=0) <= MAX_COLOR_STEP
    return alike
