"""The manifest: what is written is read back whole, by others too; a folder that moved on is noticed."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest

from data_tools import manifest
from data_tools.errors import DataToolsError, StorageError
from data_tools.scan import scan


@pytest.fixture
def written(tmp_path, save):
    """A folder of three captioned pictures in two levels, with its manifest."""
    save("a.png", 48, 32, 1, caption="first\nsecond")
    save('5_red "car" 😀/b.jpg', 32, 48, 2)
    save("c.webp", 40, 40, 3, caption="")
    result = scan(tmp_path)
    manifest.write(tmp_path, result.records)
    return tmp_path, result.records


def edit(folder, change) -> None:
    path = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(lines)), encoding="utf-8")


def test_read_gives_back_what_was_written(written):
    """The trainer sees exactly what the scan saw."""
    folder, records = written
    assert manifest.read(folder) == records and len(records) == 3


def test_the_same_records_give_the_same_bytes(written):
    """A manifest is compared and versioned; it may not differ from run to run."""
    folder, records = written
    before = (folder / "metadata.jsonl").read_bytes()
    manifest.write(folder, records)
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert stat.S_IMODE((folder / "metadata.jsonl").stat().st_mode) == 0o644
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_written_manifest_scans_clean(written):
    """Each step can be repeated: a second scan takes captions and repeats from the manifest."""
    folder, records = written
    again = scan(folder)
    again.raise_for_errors()
    assert [replace(record, source="metadata") for record in records] == again.records


def test_datasets_loads_it_as_an_imagefolder(written, monkeypatch, tmp_path_factory):
    """Users look at their data, and train elsewhere, with the same folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder, records = written
    data = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    seen = {row["sha256"]: row for row in data}
    assert len(seen) == len(records) == 3
    for record in records:
        row = seen[record.sha256]
        assert row["text"] == "\n".join(record.captions) and row["image"].size == (
            record.width,
            record.height,
        )
        assert (row["repeats"], row["role"], row["notes"]) == (
            record.repeats,
            "instance",
            "; ".join(record.notes),
        )


def test_datasets_loads_masks_as_a_second_picture(tmp_path, save, tmp_path_factory):
    """The imagefolder convention for extra pictures; rows without a mask stay."""
    datasets = pytest.importorskip("datasets")
    save("a.png", tint=1, caption="a")
    save("b.png", tint=2, caption="b")
    records = scan(tmp_path).records
    save("mask.png", tint=3)
    manifest.write(tmp_path, [replace(records[0], mask_file="mask.png"), records[1]])
    assert [record.mask_file for record in manifest.read(tmp_path)] == ["mask.png", None]
    data = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    assert data[0]["mask"].size == (48, 32) and data[1]["mask"] is None


def test_read_lists_everything_that_does_not_fit_at_once(written, save):
    """Row without file, file without row, second row, way out, changed bytes, broken line: all in one run."""
    folder, _ = written
    save("new.png", tint=9)
    save("c.webp", 40, 40, 4)
    edit(
        folder,
        lambda lines: [
            lines[0],
            lines[2],
            lines[2],
            {**lines[0], "file_name": "gone.png"},
            {**lines[0], "file_name": "../a.png"},
            {**lines[1], "file_name": "a.png", "width": "wide"},
        ],
    )
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": \n')
    with pytest.raises(DataToolsError) as caught:
        manifest.read(folder)
    for words in (
        "new.png: has no row",
        "line 3: names c.webp again",
        "gone.png'; there is no such",
        "'../a.png'",
        "c.webp: has changed since it was scanned",
        "a.png (metadata.jsonl line 6): has no usable width",
        "line 7: is not JSON at column",
    ):
        assert words in str(caught.value), words
    assert caught.value.exit_code == 8, "a row leads out of the folder"


def test_one_changed_byte_is_noticed(written):
    """A third of all damaged pictures still decode; only the digest tells."""
    folder, _ = written
    data = bytearray((folder / "a.png").read_bytes())
    data[-1] ^= 1
    (folder / "a.png").write_bytes(data)
    with pytest.raises(DataToolsError, match=r"a\.png: has changed since it was scanned"):
        manifest.read(folder)
    assert len(manifest.read(folder, check_bytes=False)) == 3
    assert any("has changed since the manifest" in str(problem) for problem in scan(folder).problems)


def test_links_out_of_the_folder_are_refused_on_reading_too(written):
    """The folder may have been changed after the scan."""
    folder, _ = written
    outside = folder.parent / f"{folder.name}-outside.png"
    os.replace(folder / "a.png", outside)
    (folder / "a.png").symlink_to(outside)
    with pytest.raises(DataToolsError, match="leads out of the folder"):
        manifest.read(folder)


def test_a_foreign_metadata_file_is_kept_whole(tmp_path, save):
    """Licences and authors that others wrote must survive our columns."""
    save("a.png")
    row = {"file_name": "a.png", "text": "x", "license": "CC-BY", "author": {"name": "Ä"}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataToolsError, match=r"has no usable width.*scan the folder again with --write"):
        manifest.read(tmp_path)
    manifest.write(tmp_path, scan(tmp_path).records)
    new = json.loads((tmp_path / "metadata.jsonl").read_text(encoding="utf-8"))
    assert new["license"] == "CC-BY" and new["author"] == {"name": "Ä"} and new["width"] == 48
    assert manifest.read(tmp_path)[0].captions == ("x",)


def test_an_unreadable_or_second_metadata_file_is_never_replaced(tmp_path, save):
    """Writing over something we could not read would destroy it."""
    save("a.png", caption="x")
    records = scan(tmp_path).records
    (tmp_path / "metadata.jsonl").write_text("not json")
    with pytest.raises(DataToolsError, match="not replaced"):
        manifest.write(tmp_path, records)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(DataToolsError, match=r"metadata\.csv"):
        manifest.write(tmp_path, records)


def test_a_crash_while_writing_leaves_the_old_manifest(written, monkeypatch):
    """Written beside, then renamed."""
    folder, records = written
    before = (folder / "metadata.jsonl").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataToolsError, match="No space left"):
        manifest.write(folder, records[:1])
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_without_a_manifest_read_says_how_to_make_one(tmp_path, save):
    """The trainer's first error must lead to the next command."""
    save("a.png")
    with pytest.raises(DataToolsError, match="scan the folder again with --write"):
        manifest.read(tmp_path)


def test_what_the_disk_refuses_is_the_disks_answer(written):
    """Exit code 5 as everywhere else, so that a script can tell a full or read-only disk from a bad picture."""
    folder, records = written
    with pytest.raises(StorageError, match=r"gone/metadata\.jsonl cannot be written .*check its permissions") as caught:
        manifest.write(folder / "gone", records)
    assert caught.value.exit_code == 5
