"""The sampler: nothing dropped, sizes never mixed, resumed by arithmetic."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.sampler import Item, Sampler

BUCKETS = [(64, 64), (48, 80), (80, 48)]
ITEMS = st.lists(
    st.builds(Item, bucket=st.sampled_from(BUCKETS), repeats=st.integers(1, 3), is_class=st.booleans()),
    min_size=1,
    max_size=30,
).filter(lambda items: any(not item.is_class for item in items))


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, batch_size=st.integers(1, 7), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_picture_appears_exactly_as_often_as_asked(items, batch_size, seed, epoch):
    """Peers drop the rest of a bucket; ours trains on every picture, in batches of one size."""
    sampler = Sampler(items, batch_size, seed)
    batches = sampler.plan_epoch(epoch)
    counts = Counter(draw.picture for batch in batches for draw in batch)
    for picture, item in enumerate(items):
        if not item.is_class:
            assert counts[picture] == item.repeats
    subjects = sum(item.repeats for item in items if not item.is_class)
    classes = [i for i, item in enumerate(items) if item.is_class]
    assert sum(counts[i] for i in classes) == (subjects if classes else 0)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({items[draw.picture].bucket for draw in batch}) == 1
    draws = [draw for batch in batches for draw in batch]
    assert len(set(draws)) == len(draws), "two draws with one key would share their noise"


@settings(max_examples=30, deadline=None)
@given(items=ITEMS, batch_size=st.integers(1, 4), start=st.integers(0, 40))
def test_resuming_is_slicing(items, batch_size, start):
    """A fresh sampler asked for step n gives what one gives that counted up to n."""
    walked = Sampler(items, batch_size, 0)
    steps = [walked.step(i, 2) for i in range(start + 3)]
    assert Sampler(items, batch_size, 0).step(start, 2) == steps[start]


def test_subject_and_class_alternate():
    """Prior preservation works in the same batch, not once an epoch."""
    items = [Item((64, 64), 1, False)] * 8 + [Item((64, 64), 1, True)] * 20
    for batch in Sampler(items, 4, 0).plan_epoch(0):
        assert sum(items[draw.picture].is_class for draw in batch) == 2


def test_class_pictures_take_turns():
    """Over the epochs every class picture is used, and about equally often."""
    items = [Item((64, 64), 1, False)] * 4 + [Item((64, 64), 1, True)] * 10
    sampler = Sampler(items, 4, 0)
    counts = Counter(d.picture for epoch in range(5) for b in sampler.plan_epoch(epoch) for d in b if d.picture >= 4)
    assert set(counts.values()) == {2} and len(counts) == 10


def test_epochs_differ_and_seeds_differ():
    """The order is shuffled anew each epoch and for each seed."""
    items = [Item((64, 64), 1, False)] * 12
    order = [[d.picture for b in Sampler(items, 4, seed).plan_epoch(epoch) for d in b] for seed, epoch in
             [(0, 0), (0, 1), (1, 0)]]  # fmt: skip
    assert order[0] != order[1] and order[0] != order[2]


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, batch_size=st.integers(1, 5), epoch=st.integers(0, 9))
def test_an_epoch_is_as_long_as_was_counted_without_planning_it(items, batch_size, epoch):
    """A resumed run finds its place by counting; one batch off would be another training."""
    sampler = Sampler(items, batch_size, 1)
    assert sampler._length(epoch) == len(sampler.plan_epoch(epoch))


def test_every_beginning_of_an_epoch_holds_both_in_proportion():
    """Exact interleaving: after n draws of a bucket the class is never more than one picture ahead or behind."""
    items = [Item((64, 64), 3, False)] * 5 + [Item((64, 64), 1, True)] * 7
    sampler = Sampler(items, 1, 0)
    whole = Sampler(items, 30, 0).plan_epoch(2)[0]
    assert len(whole) == 30 and len(sampler.plan_epoch(2)) == 30
    seen = 0
    for place, draw in enumerate(whole, start=1):
        seen += items[draw.picture].is_class
        assert abs(seen - place / 2) <= 1


def test_a_million_pictures_plan_an_epoch_from_a_few_arrays():
    """Memory is that of the arrays, whatever the epoch; draws are made when a batch is asked for."""
    items = [Item(BUCKETS[i % 3], 1, False) for i in range(1_000_000)]
    sampler = Sampler(items, 8, 0)
    first, later = sampler.plan_epoch(0), sampler.plan_epoch(7)
    assert len(first) == len(later) == sum(-(-n // 8) for n in (333_334, 333_333, 333_333))
    assert first[5] != later[5] and len(first[5]) == 8
    held = [value for value in vars(later).values() if hasattr(value, "nbytes")]
    assert sum(value.nbytes for value in held) < 20_000_000
