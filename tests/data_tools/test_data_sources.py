"""Imports: every kind of place becomes the same imagefolder; hostile archives and wrong configs are refused whole."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from data_tools import manifest
from data_tools.cli import main
from data_tools.errors import DataToolsError, UsageError
from data_tools.importing import import_pictures
from data_tools.scan import scan
from data_tools.sources import SOURCES, Order, archives, choose
from data_tools.sources import kohya_config as kohya

ROOT = Path(__file__).parents[2]


@pytest.fixture
def png(draw):
    """png(tint): the bytes of a small picture."""

    def make(tint: int = 0) -> bytes:
        buffer = io.BytesIO()
        draw(tint=tint).save(buffer, "PNG")
        return buffer.getvalue()

    return make


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in more:
            archive.addfile(info)
    return path


def taken(tmp_path: Path, place: object, **options) -> list:
    """Import into a new folder; its records."""
    done = import_pictures(Order(str(place), **options), tmp_path / "new")
    assert not [problem for problem in done.problems if problem.severity == "error"], done.problems
    result = scan(tmp_path / "new")
    result.raise_for_errors()
    return [(record.file_name, record.captions, record.role, record.repeats) for record in result.records]


def table_of_pictures(path: Path, png) -> Path:
    import pyarrow
    from pyarrow import parquet

    pictures = [{"bytes": png(number), "path": f"dir/cat {number}.png"} for number in range(3)]
    columns = {"image": pictures, "caption": ["a", "b", "c"], "score": [0.5, float("nan"), 1.0]}
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_folder_comes_with_its_layout(tmp_path, save):
    """Captions, kohya folders and masks keep meaning what they mean."""
    save("old/10_sks dog/a.png", tint=1)
    save("old/10_sks dog/b.png", tint=2, caption="by hand")
    save("old/masks/10_sks dog/b.png", tint=3)
    assert taken(tmp_path, tmp_path / "old") == [
        ("10_sks dog/a.png", ("sks dog",), "instance", 10),
        ("10_sks dog/b.png", ("by hand",), "instance", 10),
    ]
    assert scan(tmp_path / "new").records[1].mask_file == "masks/10_sks dog/b.png"


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_is_unpacked_without_its_one_top_folder(tmp_path, png, kind):
    """People pack a folder, not its content; a kohya folder's name must stay, because it counts."""
    pack = zipped if kind == "zip" else tarred
    files = {"photos/a.png": png(1), "photos/a.txt": b"a cat", "photos/deep/b.png": png(2), "photos/deep/b.txt": b"b"}
    place = pack(tmp_path / f"x.{kind}", files | {"__MACOSX/._a.png": b"?", "photos/read.me": b"?"})
    done = import_pictures(Order(str(place)), tmp_path / "once")
    assert {problem.file_name for problem in done.problems} == {"__MACOSX/._a.png", "photos/read.me"}
    assert taken(tmp_path, place) == [("a.png", ("a cat",), "instance", 1), ("deep/b.png", ("b",), "instance", 1)]
    kept = pack(tmp_path / f"y.{kind}", {"5_dog/a.png": png(1)})
    import_pictures(Order(str(kept)), tmp_path / "kohya")
    assert scan(tmp_path / "kohya").records[0].repeats == 5


def test_webdataset_shards_become_folders(tmp_path, png):
    """Keys repeat from shard to shard; img2dataset writes .txt and .json that say the same."""
    for shard in range(2):
        facts = json.dumps({"caption": f"shard {shard}", "url": "x", "sha256": "0" * 64}).encode()
        files = {"000.png": png(shard), "000.txt": f"shard {shard}".encode(), "000.json": facts}
        tarred(tmp_path / f"s-{shard:03d}.tar", files)
    wanted = [(f"s-{shard:03d}/000.png", (f"shard {shard}",), "instance", 1) for shard in range(2)]
    assert taken(tmp_path, tmp_path / "s-{000..001}.tar") == wanted
    assert [path.name for path in archives.expand(str(tmp_path / "s-*.tar"))] == ["s-000.tar", "s-001.tar"]
    with pytest.raises(UsageError, match="means 3 shards, and 1 are not there"):
        choose(str(tmp_path / "s-{000..002}.tar"))


def test_a_table_gives_pictures_captions_and_its_other_columns(tmp_path, png):
    """Parquet is what the hub stores; a score that is no number must not break the manifest."""
    assert taken(tmp_path, table_of_pictures(tmp_path / "t.parquet", png)) == [
        (f"000000{number}.png", (word,), "instance", 1) for number, word in enumerate("abc")
    ]
    rows = [json.loads(line) for line in (tmp_path / "new/metadata.jsonl").read_text().splitlines()]
    assert [(row["original_name"], row["score"]) for row in rows] == [
        ("cat 0.png", 0.5), ("cat 1.png", None), ("cat 2.png", 1.0)]  # fmt: skip
    with pytest.raises(UsageError, match=r"No column 'pic'; there are image, caption, score"):
        import_pictures(Order(str(tmp_path / "t.parquet"), image_column="pic"), tmp_path / "other")


def test_saved_and_hub_datasets_are_streamed(tmp_path, png, monkeypatch):
    """The library's own formats; a folder with data/*.parquet stands in for the hub, which is not there in CI."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"photo": [png(1), png(2)], "words": ["one", "two"]}, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    wanted = [("0000000.png", ("one",), "instance", 1), ("0000001.png", ("two",), "instance", 1)]
    assert choose(str(tmp_path / "saved"))[0] == "saved"
    assert taken(tmp_path, tmp_path / "saved", text_column="words") == wanted
    (tmp_path / "hub/data").mkdir(parents=True)
    data.to_parquet(str(tmp_path / "hub/data/train-00000-of-00001.parquet"))
    done = import_pictures(Order(f"hub:{tmp_path / 'hub'}", text_column="words"), tmp_path / "hubbed")
    assert (done.source, done.new) == ("hub", 2)
    with pytest.raises(UsageError, match=r"cannot be read from the hub .*--local-dir"):
        import_pictures(Order(f"hub:{tmp_path / 'hub'}", split="nosuch"), tmp_path / "no")


def dataset_config(tmp_path, save, extra: str = "") -> Path:
    for number in range(2):
        save(f"pics/{number}.png", tint=number, caption=f"tag {number}")
        save(f"conds/{number}.png", tint=20 + number)
    save("reg/0.png", tint=9)
    save("fine/x.png", tint=10)
    metadata = {"fine/x": {"caption": "a fine cat", "tags": "cat, fine"}, "gone": {"caption": "?"}}
    (tmp_path / "fine.json").write_text(json.dumps(metadata))
    path = tmp_path / "data.toml"
    path.write_text(
        f"""[general]
caption_extension = ".txt"
shuffle_caption = true
enable_bucket = true
[[datasets]]
resolution = [512, 768]
num_repeats = 2
  [[datasets.subsets]]
  image_dir = "{tmp_path}/pics"
  num_repeats = 3
  caption_prefix = "sks,"
  conditioning_data_dir = "{tmp_path}/conds"
  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  class_tokens = "a cat"
  {extra}
[[datasets]]
  [[datasets.subsets]]
  image_dir = "{tmp_path}/fine"
  metadata_file = "{tmp_path}/fine.json"
"""
    )
    return path


def test_a_kohya_config_becomes_one_folder(tmp_path, save):
    """Years of configs exist; what they say of pictures is followed, what they say of training is told."""
    done = import_pictures(Order(str(dataset_config(tmp_path, save))), tmp_path / "new")
    result = scan(tmp_path / "new")
    assert [(r.file_name, r.captions, r.role, r.repeats, r.mask_file) for r in result.records] == [
        ("fine/x.png", ("a fine cat, cat, fine",), "instance", 1, None),
        ("pics/0.png", ("sks, tag 0",), "instance", 3, "masks/pics/0.png"),
        ("pics/1.png", ("sks, tag 1",), "instance", 3, "masks/pics/1.png"),
        ("reg/0.png", ("a cat",), "class", 2, None),
    ]
    told = "\n".join(map(str, done.problems))
    assert "enable_bucket = true is not imported" in told and "set data.resolution in the recipe" in told
    assert "gone: names no picture" in told


def test_a_kohya_config_that_cannot_be_followed_names_every_key(tmp_path, save):
    """A mistyped key that is ignored trains something else for hours."""
    path = dataset_config(tmp_path, save, 'num_repeat = 4\n  is_reg2 = 1\n  caption_suffix = 5\n  image_dir2 = "x"')
    path.write_text(path.read_text() + '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "nowhere"\n[other]\n')
    with pytest.raises(UsageError) as caught:
        import_pictures(Order(str(path)), tmp_path / "new")
    for words in ("num_repeat: is no key", "did you mean num_repeats?", "caption_suffix: is 5", "must be str",
                  "is 'nowhere', and there is no such folder", "other: is no table"):  # fmt: skip
        assert words in str(caught.value), words
    assert not (tmp_path / "new" / "pics").exists()


def test_the_fields_that_a_config_is_sent_to_exist():
    """A remedy that names no field of a recipe sends people in circles."""
    from finetune.config import Run
    from tests.test_architecture import leaf_fields

    fields = set(leaf_fields(Run))
    assert {name.split(" ")[0] for name in kohya.IN_RECIPE.values()} - fields <= {"data.prior.prior_loss_weight"}


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "climbs out": lambda path, png: zipped(path.with_suffix(".zip"), {"a.png": png(1), "../evil.png": png(2)}),
    "absolute": lambda path, png: tarred(path.with_suffix(".tar"), {"/tmp/evil.png": png(2)}),
    "drive letter": lambda path, png: zipped(path.with_suffix(".zip"), {"C:\\evil.png": png(2)}),
    "link": lambda path, png: tarred(path.with_suffix(".tar"), {"a.png": png(1)}, link("evil.png", "/etc/passwd")),
    "hard link": lambda path, png: tarred(
        path.with_suffix(".tar"), {"a.png": png(1)}, link("evil.png", "a.png", tarfile.LNKTYPE)
    ),
    "device": lambda path, png: tarred(path.with_suffix(".tar"), {}, link("evil.png", "", tarfile.CHRTYPE)),
    "bomb": lambda path, png: tarred(path.with_suffix(".tar.gz"), {"a.png": bytes(40 * 2**20)}),
    "zip bomb": lambda path, png: deflated(path.with_suffix(".zip"), {"a.png": bytes(40 * 2**20)}),
    "no name": lambda path, png: nameless(path.with_suffix(".zip"), png),
    "encrypted": lambda path, png: encrypted(path.with_suffix(".zip"), png),
}


def deflated(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def nameless(path: Path, png) -> Path:
    """A member without a name, on which the standard library's own check for folders fails."""
    info = zipfile.ZipInfo("a.png")
    info.filename = ""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, png(1))
    return path


def encrypted(path: Path, png) -> Path:
    """An archive whose entry says that it is encrypted (bit 0 of the flags, in both headers)."""
    data = bytearray(zipped(path, {"a.png": png(1)}).read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(mark) + offset
        struct.pack_into("<H", data, place, 1)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_before_anything_is_written(tmp_path, png, name):
    """A dataset from a stranger must write nowhere else, link to nothing, and not fill the disk (code 8)."""
    place = HOSTILE[name](tmp_path / "x", png)
    with pytest.raises(DataToolsError) as caught:
        import_pictures(Order(str(place)), tmp_path / "new")
    assert caught.value.exit_code == 8 and place.name in str(caught.value)
    assert [path.name for path in (tmp_path / "new").rglob("*") if path.is_file()] == ["import.json"]
    assert not (tmp_path / "evil.png").exists() and not Path("/tmp/evil.png").exists()


def test_too_many_files_are_a_bomb_too(tmp_path, monkeypatch):
    """A million empty files fill a disk's tables with a few megabytes of archive."""
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    place = tarred(tmp_path / "x.tar", {f"{number}.txt": b"" for number in range(12)})
    with pytest.raises(DataToolsError, match="more than 10 files"):
        import_pictures(Order(str(place)), tmp_path / "new")


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_a_damaged_source_is_named(tmp_path, png, kind):
    """Half a download is the usual case; which file, and what to do."""
    path = tmp_path / f"x.{kind}"
    pack = {"zip": lambda: zipped(path, {f"{n}.png": png(n) for n in range(9)}),
            "tar": lambda: tarred(path, {f"{n}.png": png(n) for n in range(9)}),
            "parquet": lambda: table_of_pictures(path, png)}  # fmt: skip
    data = pack[kind]().read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataToolsError, match=rf"x\.{kind} .*fetch it again"):
        import_pictures(Order(str(path)), tmp_path / "new")


def test_two_members_of_one_name_are_told_apart_by_content(tmp_path, png):
    """The second would overwrite the first; the same file twice is only odd."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for data in (png(1), png(1), png(2)):
            archive.writestr("a.png", data)
    done = import_pictures(Order(str(tmp_path / "x.zip")), tmp_path / "new")
    assert (done.new, done.kept) == (1, 1) and "is there already with other content" in str(done.problems[0])


def test_an_import_is_idempotent_and_never_mixes(tmp_path, png, save):
    """Started twice it changes nothing, not even what people edited since; another source needs another folder."""
    place = table_of_pictures(tmp_path / "t.parquet", png)
    taken(tmp_path, place)
    manifest.write(tmp_path / "new", scan(tmp_path / "new").records)
    text = (tmp_path / "new/metadata.jsonl").read_text().replace('"text": "a"', '"text": "edited"')
    (tmp_path / "new/metadata.jsonl").write_text(text)
    again = import_pictures(Order(str(place)), tmp_path / "new")
    assert (again.new, again.kept) == (0, 3) and (tmp_path / "new/metadata.jsonl").read_text() == text
    save("other/a.png")
    with pytest.raises(UsageError, match="was filled from"):
        import_pictures(Order(str(tmp_path / "other")), tmp_path / "new")
    with pytest.raises(UsageError, match="is not empty"):
        import_pictures(Order(str(place)), tmp_path / "other")


def test_a_killed_import_goes_on(tmp_path, png):
    """What was written stays whole; the metadata comes last."""
    place = zipped(tmp_path / "x.zip", {f"{n:04d}.{end}": data for n in range(300)
                                        for end, data in (("png", png(n)), ("txt", b"x"))})  # fmt: skip
    command = [sys.executable, "-m", "data_tools", "import", str(place), "-o", str(tmp_path / "new")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("new/*.png"))) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "new/.part-import").write_bytes(b"half")
    assert len(taken(tmp_path, place)) == 300
    assert not list((tmp_path / "new").rglob(".part*"))


def test_the_command_imports_scans_and_writes_the_manifest(tmp_path, png, monkeypatch, capsys):
    """One command from a download to a folder that a recipe and load_dataset take."""
    table = table_of_pictures(tmp_path / "t.parquet", png)
    arguments = ["data_tools", "import", str(table), "-o", str(tmp_path / "new"), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    document = json.loads(capsys.readouterr().out)
    assert not stop.value.code and (document["exit_code"], document["new"], len(document["records"])) == (0, 3, 3)
    assert len(manifest.read(tmp_path / "new")) == 3
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "new"), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert data["text"][:] == ["a", "b", "c"] and data[0]["image"].size == (48, 32)


def test_what_is_no_source_lists_what_is(tmp_path):
    """The first mistake is the wrong path; the answer teaches the kinds."""
    with pytest.raises(UsageError) as caught:
        choose(str(tmp_path / "nothing"))
    assert all(source.summary in str(caught.value) for source in SOURCES.values())
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.zip")
        with pytest.raises(UsageError):
            choose(str(tmp_path / "pipe.zip"))
