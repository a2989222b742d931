"""Shards: whole or absent after any kill, written by many processes at once, never believed when damaged."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch

from finetune import storage
from finetune.data import fill as fill_module
from finetune.data import store as store_module
from finetune.data.fill import Recipe, fill
from finetune.data.store import CLAIMS, DAMAGED, SHARDS, Store, read_entry, read_index
from finetune.errors import DataError

FORK = multiprocessing.get_context("fork")


def key_of(item):
    return f"{item:040x}"


def value_of(item):
    return {"value": torch.full((4,), float(item)), "count": torch.tensor(item)}


def recipe(seconds=0.0, made=None):
    """Entries whose value follows from their number; `made` is told which were made."""

    def make(batch, _):
        time.sleep(seconds)
        if made is not None:
            for item in batch:
                made.put(item)
        return [value_of(item) for item in batch]

    return Recipe("numbers", key_of, lambda item: item % 2, lambda item: item, make)


def fill_up(folder, count, seconds=0.0, made=None):
    store = Store(folder)
    fill(store, range(count), recipe(seconds, made), 4)
    return store


def assert_complete(folder, count):
    """A fresh look finds every entry with its value, and makes nothing."""
    made = []
    store = Store(folder)
    fill(store, range(count), Recipe("numbers", key_of, lambda i: i % 2, lambda i: i, lambda b, _: made.extend(b)), 4)
    assert made == []
    for item in range(count):
        found, expected = store.get(key_of(item)), value_of(item)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def places(folder):
    """In how many shards each entry stands."""
    return Counter(key for path in folder.glob(SHARDS) for key in read_index(path))


def test_a_million_pictures_are_not_a_million_files(tmp_path):
    """File systems and archives choke on small files; 1,000 entries are a handful of shards here."""
    fill_up(tmp_path, 1000)
    assert len(list(tmp_path.glob(SHARDS))) == 4
    assert len(list(tmp_path.iterdir())) == 5, "the shards and the file of claims"
    assert_complete(tmp_path, 1000)


def test_shards_are_plain_safetensors(tmp_path):
    """What is on disk can be read without us."""
    from safetensors.torch import load_file

    fill_up(tmp_path, 3)
    tensors = {name: value for path in tmp_path.glob(SHARDS) for name, value in load_file(path).items()}
    assert torch.equal(tensors[f"{key_of(2)}/value"], torch.full((4,), 2.0))


def test_only_what_is_missing_is_made(tmp_path):
    """A larger set next time pays for its new part only."""
    fill_up(tmp_path, 10)
    made = FORK.SimpleQueue()
    fill_up(tmp_path, 14, made=made)
    assert sorted(made.get() for _ in range(4)) == [10, 11, 12, 13] and made.empty()
    assert set(places(tmp_path).values()) == {1}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data[20 if how == "header" else -1] ^= 0x40
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut short", "empty", "header"])
def test_a_damaged_shard_is_set_aside_and_made_again(tmp_path, how):
    """Fault 48. Full disks and lost connections leave half files; they must not end or spoil a run, nor be hidden."""
    fill_up(tmp_path, 600)
    victim = sorted(tmp_path.glob(SHARDS))[0]
    lost = len(read_index(victim))
    damage(victim, how)
    made = FORK.SimpleQueue()
    store = fill_up(tmp_path, 600, made=made)
    assert store.set_aside == [victim]
    assert victim.with_name(victim.name + DAMAGED).exists(), "nothing is deleted without being asked"
    count = 0
    while not made.empty():
        made.get()
        count += 1
    assert count == lost
    assert_complete(tmp_path, 600)


def test_a_flipped_bit_in_an_entry_is_never_trained_on(tmp_path, monkeypatch):
    """A checksum is compared on every read from disk; the next start makes the entry again."""
    fill_up(tmp_path, 5)
    for path in tmp_path.glob(SHARDS):
        damage(path, "payload")
    store = Store(tmp_path)
    store.want([key_of(i) for i in range(5)])
    caught = 0
    for item in range(5):
        if key_of(item) in store:
            try:
                store.get(key_of(item))
            except DataError as error:
                assert "was damaged after it was written" in str(error) and "start the same command again" in str(error)
                caught += 1
    assert caught == 1
    fill_up(tmp_path, 5)
    assert_complete(tmp_path, 5)


def test_an_older_cache_is_left_alone(tmp_path):
    """Files of another version are neither read nor touched."""
    old = tmp_path / f"{'a' * 64}.safetensors"
    old.write_bytes(b"from another time")
    fill_up(tmp_path, 3)
    assert old.read_bytes() == b"from another time"


def test_more_than_fits_into_memory_is_read_from_disk(tmp_path, monkeypatch):
    """Memory does not grow with the set."""
    monkeypatch.setattr(store_module, "RESIDENT_BYTES", 50)
    fill_up(tmp_path, 20)
    store = Store(tmp_path)
    store.want([key_of(i) for i in range(20)])
    for _ in range(2):
        for item in range(20):
            assert store.get(key_of(item))["count"] == item
    assert len(store._resident) == 2, "24 bytes each"


def die_at(point):
    """SIGKILL this process at the `point`-th call of anything that writes a shard."""
    left = point

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    storage.tensor_bytes = counted(storage.tensor_bytes)
    storage._sync = counted(storage._sync)
    storage._open_new = counted(storage._open_new)
    storage._sync_folder = counted(storage._sync_folder)
    storage.os = type("os", (), {**vars(os), "replace": counted(os.replace)})


def killed_while_filling(folder, point):
    die_at(point)
    fill_up(folder, 8)


def test_a_kill_at_any_point_of_a_write_leaves_whole_shards_or_nothing(tmp_path):
    """Fault 2, for caches: every point of the write path, SIGKILL, then the next start completes the work."""
    point = 0
    while True:
        folder = tmp_path / str(point)
        child = FORK.Process(target=killed_while_filling, args=(folder, point))
        child.start()
        child.join()
        shards = list(folder.glob(SHARDS))
        for path in shards:
            for entry in read_index(path).values():
                read_entry(path, entry)
        fill_up(folder, 8)
        assert_complete(folder, 8)
        assert not list(folder.glob(f"*{DAMAGED}"))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        point += 1
    assert point > 16, "two tensors of eight entries, and the file around them"


def test_many_processes_make_each_entry_once_even_if_one_is_killed(tmp_path, monkeypatch):
    """Fault 49. Four at once on one folder; the one that dies loses its piece to the others, at once."""
    monkeypatch.setattr(fill_module, "PIECE", 16)
    monkeypatch.setattr(fill_module, "POLL", 0.01)
    made = FORK.SimpleQueue()
    workers = [FORK.Process(target=fill_up, args=(tmp_path, 160, 0.02, made)) for _ in range(4)]
    for worker in workers:
        worker.start()
    while not list(tmp_path.glob(SHARDS)):
        time.sleep(0.005)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    assert places(tmp_path) == {key_of(item): 1 for item in range(160)}
    assert_complete(tmp_path, 160)


def test_a_claim_is_free_again_when_its_holder_is_killed(tmp_path):
    """A lock file with a process number in it would stay behind; a kernel lock does not."""
    ready = FORK.Event()

    def hold():
        with Store(tmp_path).claim("ab" * 20) as ours:
            assert ours
            ready.set()
            time.sleep(60)

    holder = FORK.Process(target=hold)
    holder.start()
    assert ready.wait(30)
    with Store(tmp_path).claim("ab" * 20) as ours:
        assert not ours
    with Store(tmp_path).claim("cd" * 20) as ours:
        assert ours, "another piece of work is free"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with Store(tmp_path).claim("ab" * 20) as ours:
        assert ours
    assert (tmp_path / CLAIMS).stat().st_size == 0, "locks lie beyond the end; the file never grows"


def test_a_holder_that_hangs_does_not_hold_up_the_others_forever(tmp_path, monkeypatch):
    """Fault class "never hangs": after a while without news the work is done twice rather than never."""
    monkeypatch.setattr(fill_module, "PATIENCE", 0.2)
    monkeypatch.setattr(fill_module, "POLL", 0.02)
    monkeypatch.setattr(store_module, "_locked", lambda descriptor, place: False)
    fill_up(tmp_path, 6)
    assert_complete(tmp_path, 6)
