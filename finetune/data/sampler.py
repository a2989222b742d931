"""Which pictures go into which forward pass: a pure function of (seed, epoch), resumed by arithmetic.

Nothing is dropped: a bucket's last batch is simply smaller. Every picture of one batch has the same size. With prior
preservation each epoch draws as many class pictures as subject pictures, going round the class folder, and the two
alternate within a bucket.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.rng import python_rng

Bucket = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Item:
    """What the sampler needs to know of a picture."""

    bucket: Bucket
    repeats: int
    is_class: bool


class Sampler:
    """Plans micro-batches for an endless run over a fixed set of pictures."""

    def __init__(self, items: Sequence[Item], batch_size: int, seed: int) -> None:
        """Plan for `items`; `batch_size` counts the pictures of all processes together."""
        self._items = items
        self._batch_size = batch_size
        self._seed = seed
        self._starts = [0]
        self._planned: tuple[int, list[list[Draw]]] = (-1, [])

    def plan_epoch(self, epoch: int) -> list[list[Draw]]:
        """The micro-batches of one pass: every subject picture `repeats` times, and as many class pictures."""
        if self._planned[0] != epoch:
            by_bucket: dict[Bucket, tuple[list[Draw], list[Draw]]] = {}
            for draw in [*self._subject_draws(epoch), *self._class_draws(epoch)]:
                item = self._items[draw.picture]
                by_bucket.setdefault(item.bucket, ([], []))[item.is_class].append(draw)
            batches = []
            for bucket in sorted(by_bucket):
                ordered = self._interleave(*by_bucket[bucket], epoch, bucket)
                batches += [ordered[i : i + self._batch_size] for i in range(0, len(ordered), self._batch_size)]
            python_rng(self._seed, "batch order", epoch).shuffle(batches)
            self._planned = (epoch, batches)
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
            self._starts.append(self._starts[-1] + len(self.plan_epoch(len(self._starts) - 1)))
        return bisect_right(self._starts, index) - 1

    def _subject_draws(self, epoch: int) -> list[Draw]:
        return [
            Draw(picture, epoch, repeat)
            for picture, item in enumerate(self._items)
            if not item.is_class
            for repeat in range(item.repeats)
        ]

    def _class_draws(self, epoch: int) -> list[Draw]:
        pictures = [i for i, item in enumerate(self._items) if item.is_class]
        if not pictures:
            return []
        python_rng(self._seed, "class order").shuffle(pictures)
        count = sum(item.repeats for item in self._items if not item.is_class)
        first = epoch * count
        return [
            Draw(pictures[(first + i) % len(pictures)], epoch, i // len(pictures)) for i in range(count)
        ]

    def _interleave(self, subject: list[Draw], prior: list[Draw], epoch: int, bucket: Bucket) -> list[Draw]:
        """Both shuffled, then spread evenly into each other, so that a batch holds both in proportion."""
        for name, draws in (("subject", subject), ("class", prior)):
            python_rng(self._seed, f"{name} order", epoch, *bucket).shuffle(draws)
        places = [((i + 0.5) / len(draws), rank, draw) for rank, draws in enumerate((subject, prior))
                  for i, draw in enumerate(draws)]  # fmt: skip
        return [draw for _, _, draw in sorted(places, key=lambda place: place[:2])]
