"""Lists and tables on the disk behave as those in memory, and a folder of many pictures does not fill the memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from data_tools import folder, inspection, manifest, shelves
from data_tools.fingerprints import sha256
from data_tools.memory import Memory
from data_tools.pool import in_workers
from data_tools.records import RECORD, Focus, ImageRecord
from data_tools.scan import scan
from data_tools.shelves import Index, Lookup, NamedShelf, Shelf, distinct

WHITE = (255, 255, 255)


@pytest.fixture(params=["whole keys", "keys that collide"])
def hashes(request, monkeypatch):
    """Once with the hashes that there are, once with only five of them: what is found must not depend on luck."""
    monkeypatch.setattr(shelves, "BLOCK", 500)
    if request.param == "keys that collide":
        monkeypatch.setattr(shelves, "hash", lambda key: hash(key) % 5, raising=False)


def test_a_shelf_is_a_list(monkeypatch):
    """Records, names and pictures stand on it; a place that gives its neighbour trains on the wrong caption."""
    monkeypatch.setattr(shelves, "BLOCK", 100)
    things = [f"thing {i} é \udce9" * (i % 4) for i in range(300)]
    shelf = Shelf(things)
    assert shelf == things and list(shelf) == things and things == shelf and len(shelf) == 300
    assert [shelf[i] for i in range(-300, 300)] == things + things
    assert shelf[:3] == things[:3] and shelf[290:] == things[290:] and shelf[5:2] == []
    assert shelf[::-100] == things[::-100]
    assert shelf != things[:-1] and shelf != [*things[:-1], "x"] and Shelf() == []
    assert shelf.at([3, 4, 5]) == things[3:6] and shelf.at([7, -1, 2]) == [things[7], None, things[2]]
    with pytest.raises(IndexError):
        shelf[300]


def test_a_record_comes_back_from_a_shelf_as_it_was():
    """Nested values, None and numbers, as JSON would not keep them apart."""
    plain = ImageRecord("a.png", 3, 4, ("one", "two"))
    focused = ImageRecord("b.png", 1, 2, (), loss_weight=0.1, focus=Focus(0.5, 0.25), notes=("x",), mask_file="m")
    shelf = Shelf([plain, focused], *RECORD)
    assert shelf == [plain, focused] and isinstance(shelf[1].focus, Focus) and isinstance(shelf[0].captions, tuple)


def test_worker_processes_read_a_shelf_at_once(monkeypatch):
    """They share the file with their parent and with one another; one place in it for all would mix the rows up."""
    monkeypatch.setattr(shelves, "BLOCK", 100)
    shelf = Shelf(str(i) * 7 for i in range(500))
    assert list(in_workers(str.upper, shelf, 4, lambda thing, code: "died")) == list(shelf)


def test_a_named_shelf_is_a_dict(hashes):
    """Set, replaced, taken out, asked for one by one and many at once, as often as it comes."""
    chance = random.Random(7)
    table, wanted = NamedShelf[int](), dict[str, int]()
    names = [f"name {i}" for i in range(400)]
    for step in range(1500):
        name = chance.choice(names)
        if chance.random() < 0.2 and name in wanted:
            del table[name], wanted[name]
        else:
            table[name] = wanted[name] = step
        if step % 50 == 0:
            assert table.get(name) == wanted.get(name) and (name in table) == (name in wanted)
    assert dict(table.each()) == dict(table.items()) == wanted and len(table) == len(wanted)
    asked = [*chance.sample(names, 300), "nowhere"]
    assert list(table.gather(asked)) == [(name, wanted.get(name)) for name in asked]
    with pytest.raises(KeyError):
        table["nowhere"]
    with pytest.raises(KeyError):
        del table["nowhere"]


def test_a_lookup_finds_all_of_a_kind(hashes):
    """Several pictures share a stem, and all of them get its caption."""
    things = [f"{i % 50}.{i}" for i in range(200)]
    lookup = Lookup(things, lambda thing: thing.partition(".")[0])
    assert lookup("7") == ["7.7", "7.57", "7.107", "7.157"] and lookup("50") == []
    assert list(distinct(["b", "a", "b", "c", "a"])) == ["b", "a", "c"]


def test_repeated_keys_are_found():
    """Exact copies are found by their pixels' hash, names that differ in case only by their folded form."""
    assert Index("abacb").repeated() == [0, 1, 2, 4] and Index().repeated() == []


def test_a_scan_does_not_hold_its_pictures_in_memory(tmp_path, monkeypatch):
    """A million pictures at the 2.6 kB each that records take in memory would be 2.6 GB, for a list of file names."""

    def seen(name, data, digest, background):
        return ImageRecord(name, 64, 64, (), sha256=digest, pixel_sha256=digest, phash=digest[:16])

    # keep: small blocks, so that what is held of a few pictures is not all of it blocks that are not full yet.
    for name, size in (("BLOCK", 2**12), ("AT_ONCE", 64), ("UNSORTED", 64)):
        monkeypatch.setattr(shelves, name, size)
    monkeypatch.setattr(folder, "SORTED_AT_ONCE", 200)
    monkeypatch.setattr(inspection, "_decoded", seen)
    few, many = (_peak(tmp_path / str(count), count) for count in (500, 2000))
    assert (many - few) / 1500 < 120, "bytes a picture"


def _peak(root: Path, count: int) -> int:
    """Bytes that are held at most while a folder is scanned for the second time, and its manifest written and read."""
    root.mkdir()
    for number in range(count):
        (root / f"{number:06d}.png").write_bytes(sha256(str(number).encode()).encode())
        (root / f"{number:06d}.txt").write_text(f"thing number {number}")
    scan(root, memory=Memory(root, WHITE, folder=root.parent / "memory"), workers=1)
    tracemalloc.start()
    result = scan(root, memory=Memory(root, WHITE, folder=root.parent / "memory"), workers=1)
    assert (len(result.records), result.problems) == (count, [])
    manifest.write(root, result.records)
    assert len(manifest.read(root, check_bytes=False)) == count
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held
