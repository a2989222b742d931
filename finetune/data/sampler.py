"""Which pictures go into which forward pass: a pure function of (seed, epoch), resumed by arithmetic.

Nothing is dropped: a bucket's last batch is simply smaller. Every picture of one batch has the same size. With prior
preservation each epoch draws as many class pictures as subject pictures, going round the class folder, and the two
alternate within a bucket. An epoch is a few arrays, so a million pictures are planned in a fraction of a second.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.rng import rng

Bucket = tuple[int, int]
"""(height, width) in pixels."""
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of one picture: the key of all its randomness.

    Attributes:
        picture: index into the dataset's pictures.
        epoch: the pass over the data in which it appears.
        repeat: how many times it appeared before in this epoch.
    """

    picture: int
    epoch: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Item:
    """What the sampler needs to know of a picture."""

    bucket: Bucket
    repeats: int
    is_class: bool


class Epoch(Sequence[list[Draw]]):
    """The micro-batches of one pass; draws are made when a batch is asked for."""

    def __init__(self, epoch: int, picture: Numbers, repeat: Numbers, starts: Numbers, ends: Numbers) -> None:
        """Batch i holds the draws from `starts[i]` up to `ends[i]` of the arrays `picture` and `repeat`."""
        self._epoch, self._picture, self._repeat = epoch, picture, repeat
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> list[Draw]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Draw]]: ...
    def __getitem__(self, index: int | slice) -> list[Draw] | list[list[Draw]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        span = slice(int(self._starts[index]), int(self._ends[index]))
        pairs = zip(self._picture[span].tolist(), self._repeat[span].tolist(), strict=True)
        return [Draw(picture, self._epoch, repeat) for picture, repeat in pairs]


class Sampler:
    """Plans micro-batches for an endless run over a fixed set of pictures."""

    def __init__(self, items: Iterable[Item], batch_size: int, seed: int) -> None:
        """Plan for `items`; `batch_size` counts the pictures of all processes together."""
        self._batch_size = batch_size
        self._seed = seed
        met: dict[Bucket, int] = {}
        facts = array("q")
        for item in items:
            facts.extend((met.setdefault(item.bucket, len(met)), item.repeats, item.is_class))
        bucket, repeats, is_class = np.frombuffer(facts, dtype=np.int64).reshape(-1, 3).T
        self._buckets = sorted(met)
        self._bucket = np.array([self._buckets.index(each) for each in met], dtype=np.int64)[bucket]
        subject = np.flatnonzero(is_class == 0)
        self._subject = np.repeat(subject, repeats[subject])
        self._subject_repeat = _count_within(repeats[subject])
        prior = np.flatnonzero(is_class)
        self._prior = prior[_permutation(len(prior), seed, "class order")]
        self._counts = _per_bucket(self._bucket[self._subject], len(self._buckets))
        self._lap = _per_bucket(self._bucket[self._prior], len(self._buckets))
        self._starts = [0]
        self._planned: tuple[int, Epoch] | None = None

    def plan_epoch(self, epoch: int) -> Epoch:
        """The micro-batches of one pass: every subject picture `repeats` times, and as many class pictures."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def micro_batch(self, index: int) -> list[Draw]:
        """The `index`-th micro-batch of the run, counted from 0 over all epochs."""
        epoch = self.epoch_of(index)
        return self.plan_epoch(epoch)[index - self._starts[epoch]]

    def step(self, step: int, accumulation: int) -> list[list[Draw]]:
        """The micro-batches of optimizer step `step`, counted from 0."""
        return [self.micro_batch(i) for i in range(step * accumulation, (step + 1) * accumulation)]

    def epoch_of(self, index: int) -> int:
        """The epoch that the `index`-th micro-batch belongs to."""
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + self._length(len(self._starts) - 1))
        return bisect_right(self._starts, index) - 1

    def _length(self, epoch: int) -> int:
        """Micro-batches of an epoch, counted without planning it."""
        counts = self._counts
        if len(self._prior):
            laps, rest = divmod(len(self._subject), len(self._prior))
            first = epoch * len(self._subject) % len(self._prior)
            window = self._prior[(first + np.arange(rest)) % len(self._prior)]
            counts = counts + laps * self._lap + _per_bucket(self._bucket[window], len(self._buckets))
        return int(np.sum(-(-counts // self._batch_size)))

    def _plan(self, epoch: int) -> Epoch:
        picture, repeat, is_class = self._subject, self._subject_repeat, np.zeros(len(self._subject), dtype=bool)
        if len(self._prior):
            turn = np.arange(len(self._subject))
            drawn = self._prior[(epoch * len(self._subject) + turn) % len(self._prior)]
            picture = np.concatenate([picture, drawn])
            repeat = np.concatenate([repeat, turn // len(self._prior)])
            is_class = np.concatenate([is_class, ~is_class])
        shuffled = _permutation(len(picture), self._seed, "epoch order", epoch)
        bucket = self._bucket[picture[shuffled]].astype(np.int32)
        by_bucket = shuffled[np.argsort(bucket, kind="stable")]
        counts = _per_bucket(bucket, len(self._buckets))
        edges = np.concatenate([[0], np.cumsum(counts)])
        if is_class.any():
            parts = [by_bucket[a:b] for a, b in pairwise(edges)]
            by_bucket = np.concatenate([_interleaved(part, is_class[part]) for part in parts])
        starts = np.concatenate([np.arange(a, b, self._batch_size) for a, b in pairwise(edges)])
        ends = np.minimum(starts + self._batch_size, edges[np.searchsorted(edges, starts, side="right")])
        order = _permutation(len(starts), self._seed, "batch order", epoch)
        return Epoch(epoch, picture[by_bucket], repeat[by_bucket], starts[order], ends[order])


def _interleaved(draws: Numbers, is_class: NDArray[np.bool_]) -> Numbers:
    """Subject and class draws spread evenly into each other, so that a batch holds both in proportion."""
    place = np.empty(len(draws))
    for chosen in (~is_class, is_class):
        count = int(chosen.sum())
        place[chosen] = (np.arange(count) + 0.5) / max(count, 1)
    return draws[np.lexsort((is_class, place))]


def _count_within(repeats: Numbers) -> Numbers:
    """0 .. repeats[i] - 1 for every i, one after the other."""
    return np.arange(int(repeats.sum())) - np.repeat(np.cumsum(repeats) - repeats, repeats)


def _per_bucket(bucket: NDArray[np.integer], buckets: int) -> Numbers:
    return np.bincount(bucket, minlength=buckets)


def _permutation(count: int, seed: int, purpose: str, *ids: int) -> Numbers:
    """A keyed shuffle of 0 .. count - 1."""
    shuffled: Numbers = torch.randperm(count, generator=rng(seed, purpose, *ids)).numpy()
    return shuffled
