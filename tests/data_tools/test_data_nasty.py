"""The deliberately nasty folder: one file per case, and the report names each of them. Rows 27 to 45 and 61 of the
fault matrix; see docs/faults.md."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import manifest
from data_tools.cli import main
from data_tools.scan import ScanResult, scan
from tests.campaigns import fuzz

ERROR, WARNING, NOTE = "error", "warning", "note"
EXIF = 0x0112


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 8) + b"IDAT" + bytes(12)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(draw, number: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF] = number
    return encoded(draw(40, 30, 60 + number), "JPEG", exif=exif)


def files(draw) -> dict[str, tuple[bytes, list[tuple[str, str]]]]:
    """name -> its bytes, and what must be said of it: (severity, words); nothing for one that is simply fine."""
    rgba = draw(40, 30, 11).convert("RGBA")
    rgba.putalpha(Image.new("L", (40, 30), 128))
    grey_alpha = Image.merge("LA", (draw(40, 30, 23).convert("L"), Image.new("L", (40, 30), 9)))
    jpeg = encoded(draw(200, 200, 12), "JPEG")
    frames = {"save_all": True, "append_images": [draw(40, 30, 14), draw(40, 30, 15)]}
    grey16 = Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16))
    decomposed = unicodedata.normalize("NFD", "café.png")
    return {
        "fine.jpg": (encoded(draw(40, 30, 1), "JPEG"), []),
        "fine.webp": (encoded(draw(40, 30, 2), "WEBP"), []),
        "fine.avif": (encoded(draw(40, 30, 3), "AVIF"), []),
        "fine.bmp": (encoded(draw(40, 30, 4), "BMP"), []),
        "zero.png": (b"", [(ERROR, "is empty (0 bytes)")]),
        "half.jpg": (jpeg[: len(jpeg) // 2], [(ERROR, "is truncated")]),
        "half.png": (encoded(draw(64, 64, 13), "PNG")[:-40], [(ERROR, "truncated|damaged")]),
        "page.png": (b"<!DOCTYPE html><html>404</html>", [(ERROR, "<!DOCTYPE html>")]),
        "bomb100.png": (bomb(10_000, 10_000), [(ERROR, "10000 x 10000 pixels; pictures above 64 million")]),
        "bomb400.png": (bomb(20_000, 20_000), [(ERROR, "bomb|20000 x 20000")]),
        "animated.gif": (encoded(draw(40, 30, 16), "GIF", **frames), [(NOTE, "first of 3 frames")]),
        "animated.webp": (encoded(draw(40, 30, 17), "WEBP", **frames), [(NOTE, "first of 3 frames")]),
        "cmyk.jpg": (encoded(draw(40, 30, 18).convert("CMYK"), "JPEG"), [(NOTE, "CMYK converted")]),
        "grey16.png": (encoded(grey16, "PNG"), []),
        "float.tif": (encoded(Image.fromarray(np.full((30, 40), 7e5, np.float32)), "TIFF"), [(ERROR, "float grey")]),
        "palette.png": (encoded(draw(40, 30, 19).quantize(16), "PNG"), []),
        "alpha.png": (encoded(rgba, "PNG"), [(NOTE, "alpha composited on white")]),
        "la.png": (encoded(grey_alpha, "PNG"), [(NOTE, "alpha composited")]),
        "icc.png": (encoded(draw(40, 30, 20), "PNG", icc_profile=b"broken"), [(NOTE, "ICC profile unusable")]),
        **{f"turn{n}.jpg": (turned(draw, n), [(NOTE, "EXIF")] if n > 1 else []) for n in range(1, 9)},
        "dot.png": (encoded(draw(1, 1), "PNG"), [(ERROR, "1 x 1 pixels")]),
        "line.png": (encoded(draw(1, 3000), "PNG"), [(ERROR, "1 x 3000 pixels")]),
        "sliver.png": (encoded(draw(20, 600, 21), "PNG"), [(WARNING, "30.0 to 1")]),
        "lies.png": (encoded(draw(40, 30, 22), "WEBP"), []),
        "layers.psd": (b"8BPS", [(NOTE, "is left aside (.psd)")]),
        ".DS_Store": (b"x", [(NOTE, "is hidden")]),
        "Case.png": (encoded(draw(40, 30, 24), "PNG"), []),
        "case.PNG": (encoded(draw(40, 30, 25), "PNG"), [(WARNING, "differs from Case.png only in upper")]),
        "the copy.png": (encoded(Image.open(io.BytesIO(encoded(draw(40, 30, 4), "BMP"))), "PNG"),
                             [(WARNING, "exactly the pixels of")]),
        "spa ce 'q' 😀.png": (encoded(draw(40, 30, 26), "PNG"), []),
        decomposed: (encoded(draw(40, 30, 27), "PNG"), []),
        "n" * 251 + ".png": (encoded(draw(40, 30, 28), "PNG"), []),
        "CON.png": (encoded(draw(40, 30, 29), "PNG"), [(NOTE, "Windows cannot hold")]),
        "esc\x1b[2J.png": (encoded(draw(40, 30, 30), "PNG"), []),
        "test_1.png": (encoded(draw(40, 30, 31), "PNG"), [(NOTE, "'test' in its path")]),
        "my_photo.png": (encoded(draw(40, 30, 32), "PNG"), [(ERROR, "has no caption")]),
    }  # fmt: skip


TEXTS: dict[str, tuple[bytes, str, list[tuple[str, str]]]] = {
    "bom": (b"\xef\xbb\xbfa cat", "a cat", []),
    "crlf": (b"a\r\n\r\nb\r", "a|b", []),
    "utf16": ("a cät".encode("utf-16"), "a cät", []),
    "latin1": (b"na\xefve", "", [(ERROR, "line 1, byte 3: byte 0xef is not UTF-8")]),
    "nul": (b"a\0b", "", [(ERROR, "a NUL character")]),
    "control": (b"a\x1b[31mb", "", [(ERROR, "control character U+001B")]),
    "endoftext": (b"a <|endoftext|> b", "", [(ERROR, "<|endoftext|>")]),
    "blank": (b" \n", "", [(WARNING, "is an empty caption")]),
    "my": (b"of another picture", "", [(WARNING, "a text file without a picture")]),
    "broken": (b"", "", []),
}
"""stem -> bytes of the text file beside stem.png, the captions wanted, what must be said of the text file."""


@pytest.fixture
def nasty(tmp_path, draw) -> tuple[Path, ScanResult, dict]:
    """The folder, its scan, and what was asked of every file."""
    folder = tmp_path / "nasty"
    folder.mkdir()
    asked = {name: told for name, (_, told) in files(draw).items()}
    for name, (data, _) in files(draw).items():
        (folder / name).write_bytes(data)
        if name != "my_photo.png" and name not in ("layers.psd", ".DS_Store"):
            text = name.rsplit(".", 1)[0] + ".txt"
            (folder / text).write_bytes(b"a caption") if len(text) < 250 else None
    (folder / ("n" * 251 + ".txt")).write_bytes(b"a caption")
    (folder / "Case.txt").unlink()
    (folder / "Case.txt").write_bytes(b"a caption")
    for number, (stem, (data, _, told)) in enumerate(TEXTS.items()):
        if stem != "my":
            draw(40, 30, 40 + number).save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_bytes(data)
        asked[f"{stem}.txt"] = told
    (folder / "broken.txt").unlink()
    (folder / "broken.json").write_bytes(b'{"text": "a')
    asked["broken.json"] = [(ERROR, "is not JSON at column 10")]
    (tmp_path / "outside.png").write_bytes(encoded(draw(40, 30, 99), "PNG"))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    asked["link.png"] = [(ERROR, "leads out of the folder")]
    (folder / "gone.png").symlink_to(folder / "nothing")
    asked["gone.png"] = [(ERROR, "is a broken link")]
    (folder / "folder.png").mkdir()
    asked["folder.png"] = [(NOTE, "is a folder named like a picture")]
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
        asked["pipe.png"] = [(ERROR, "is a named pipe")]
    return folder, scan(folder), asked


def said(result: ScanResult, name: str) -> list[tuple[str, str]]:
    """What the report says of a file: problems, and what the decoder did to it."""
    told = [(p.severity, f"{p.what}; {p.why}") for p in result.problems if p.file_name == name]
    return told + [(NOTE, note) for record in result.records if record.file_name == name for note in record.notes]


def test_every_case_of_the_nasty_folder_is_named(nasty):
    """One run, no crash, no hang; each file is usable or told with its reason, and nothing is told of the fine ones."""
    folder, result, asked = nasty
    for name, wanted in asked.items():
        told = said(result, name)
        for severity, words in wanted:
            matches = [text for kind, text in told if kind == severity and any(w in text for w in words.split("|"))]
            assert matches, f"{name!r}: {severity} {words!r} is not among {told}"
        refused = any(severity == ERROR for severity, _ in wanted)
        assert refused == any(kind == ERROR for kind, _ in told), f"{name!r}: {told}"
    on_disk = {path.name for path in folder.iterdir()}
    records = {record.file_name for record in result.records}
    problems = {problem.file_name for problem in result.problems}
    read = {name for name in on_disk if name.endswith((".txt", ".json"))}
    # keep: a caption file that cannot be read is named in place of its picture.
    told_by_caption = {f"{Path(name).stem}.png" for name in problems & read}
    assert on_disk - records - problems - read - told_by_caption == set(), "left out in silence"


def test_captions_of_the_nasty_folder_are_what_was_written(nasty):
    """Marks and line ends go, words stay."""
    _, result, _ = nasty
    captions = {record.file_name: "|".join(record.captions) for record in result.records}
    for stem, (_, wanted, told) in TEXTS.items():
        assert captions.get(f"{stem}.png", "") == wanted or any(kind == ERROR for kind, _ in told)


def test_the_report_is_the_same_when_nothing_changes(nasty):
    """CI compares reports; their order may not depend on threads or the file system."""
    folder, result, _ = nasty
    again = scan(folder, workers=1)
    assert again.problems == result.problems and again.records == result.records


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["data_tools", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_json_holds_everything_and_the_exit_code(nasty, monkeypatch, capsys):
    """A CI job reads one object; a link out of the folder is the gravest of all (8)."""
    folder, result, _ = nasty
    code, out, err = call(monkeypatch, capsys, "scan", folder, "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 8 and "Traceback" not in err
    assert len(document["problems"]) == len(result.problems) and len(document["records"]) == len(result.records)
    assert {"file_name", "severity", "what", "why", "remedy", "code"} == set(document["problems"][0])
    for hostile in ("\x1b", "\u202e"):
        assert hostile not in out + err


@pytest.mark.parametrize(
    "break_it, code",
    [
        (lambda folder: (folder / "b.png").write_bytes(b""), 3),
        (lambda folder: (folder / "b.png").symlink_to("/etc/hostname"), 8),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "../b.png", "text": "x"}'), 8),
        (lambda folder: (folder / "b.png").symlink_to(folder / "b.png"), 3),
        (lambda folder: None, 0),
    ],
)
def test_the_exit_code_tells_the_kind_of_fault(tmp_path, save, monkeypatch, capsys, break_it, code):
    """To be mended is 3, unsafe is 8: a job may retry the one and must stop for the other."""
    folder = save("data/a.png", caption="a").parent
    break_it(folder)
    assert call(monkeypatch, capsys, "scan", folder)[0] == code


def test_strict_takes_warnings_for_errors(tmp_path, save, monkeypatch, capsys):
    """Releases want no doubts; daily work wants to go on."""
    folder = save("data/a.png", caption=" ").parent
    assert call(monkeypatch, capsys, "scan", folder)[0] == 0
    code, _, err = call(monkeypatch, capsys, "scan", folder, "--strict", "--write")
    assert code == 3 and "empty caption" in err and not (folder / "metadata.jsonl").exists()
    code, out, _ = call(monkeypatch, capsys, "scan", folder, "--strict", "--json")
    assert code == json.loads(out)["exit_code"] == 3


def test_a_file_without_permission_is_a_matter_of_storage(tmp_path, save, monkeypatch, capsys):
    """Code 5: nothing about the data is wrong."""
    folder = save("data/a.png", caption="a").parent

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_tools.files.os.open", refuse)
    code, _, err = call(monkeypatch, capsys, "scan", folder)
    assert code == 5 and "cannot be read (Permission denied)" in err and "a.png" in err


def test_heic_is_read_through_its_plugin(draw):
    """iPhones write nothing else; the plugin is an extra, and part of the development tools."""
    pytest.importorskip("pillow_heif")
    from data_tools.images import decode

    image, _ = decode(encoded(draw(64, 48, 3), "HEIF", quality=95))
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(draw(64, 48, 3)).astype(int)).mean() < 8


def test_json_beside_a_picture_says_caption_tags_role_and_repeats(tmp_path, save):
    """Taggers and downloaders write .json; what it says of the subject's class and weight counts too."""
    for number in range(4):
        save(f"{number}.png", tint=number)
    said = [{"caption": "a cat", "tags": ["black", "cat"]}, {"tags": "a, b"},
            {"text": "x", "role": "class", "repeats": 3}, {"url": "http://x"}]  # fmt: skip
    for number, values in enumerate(said):
        (tmp_path / f"{number}.json").write_text(json.dumps(values))
    (tmp_path / "3.txt").write_text("from the text")
    (tmp_path / "other.json").write_text("{")
    result = scan(tmp_path)
    assert [(r.captions, r.role, r.repeats) for r in result.records] == [
        (("a cat, black, cat",), "instance", 1), (("a, b",), "instance", 1), (("x",), "class", 3),
        (("from the text",), "instance", 1)]  # fmt: skip
    told = {problem.file_name: problem.what for problem in result.problems}
    assert told == {"3.json": "holds no caption", "other.json": "is left aside (.json)"}


def test_parquet_metadata_is_metadata(tmp_path, save, monkeypatch, capsys):
    """The third form of an imagefolder's metadata; a second file beside it is refused as by `datasets`."""
    import pyarrow
    from pyarrow import parquet

    save("a.png", tint=1)
    save("b.png", tint=2)
    columns = {"file_name": ["a.png", "b.png"], "text": ["one", "two"], "role": ["instance", "class"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "metadata.parquet")
    assert [(r.captions, r.role) for r in scan(tmp_path).records] == [(("one",), "instance"), (("two",), "class")]
    assert "metadata.parquet away" in call(monkeypatch, capsys, "scan", tmp_path, "--write")[2]
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    assert "is not parquet" in str(scan(tmp_path).problems)


def test_masks_are_found_by_name_and_reach_the_manifest(tmp_path, save):
    """masks/cat.png, cat-masklabel.png and a row's mask_file: one thing, read back from the manifest."""
    for number, name in enumerate(("a.png", "sub/b.png", "c.png", "masks/a.png", "masks/sub/b.png", "c-masklabel.png")):
        save(f"data/{name}", 40, 30, number)
    result = scan(tmp_path / "data", template="x")
    wanted = [("a.png", "masks/a.png"), ("c.png", "c-masklabel.png"), ("sub/b.png", "masks/sub/b.png")]
    assert [(r.file_name, r.mask_file) for r in result.records] == wanted
    manifest.write(tmp_path / "data", result.records)
    assert [(r.file_name, r.mask_file) for r in manifest.read(tmp_path / "data")] == wanted
    save("data/masks/nobody.png", 40, 30, 7)
    save("data/masks/a.png", 30, 40, 8)
    told = "\n".join(map(str, scan(tmp_path / "data").problems))
    assert "masks/nobody.png: is the mask of no picture" in told and "a.png: has a mask of 30 x 40" in told


def test_a_row_may_name_the_mask_in_two_ways(tmp_path, save):
    """mask_file is what people write, mask_file_name what `datasets` reads; both at once must agree."""
    for number, name in enumerate(("a.png", "b.png", "m.png", "masks/a.png")):
        save(name, 40, 30, number)
    rows = [{"file_name": "a.png", "text": "x", "mask_file": "m.png"},
            {"file_name": "b.png", "text": "x", "mask_file": "m.png", "mask_file_name": "a.png"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = scan(tmp_path)
    assert [(r.file_name, r.mask_file) for r in result.records] == [("a.png", "m.png")]
    told = "\n".join(map(str, result.problems))
    assert "are one column under two names" in told and "has the mask masks/a.png by its name" in told


def test_a_folder_called_masks_may_hold_pictures(tmp_path, save):
    """Carnival masks are a subject; only names that fit pictures make it a folder of masks."""
    save("masks/venice.png", caption="a mask")
    assert [record.file_name for record in scan(tmp_path).records] == ["masks/venice.png"]


def test_a_short_fuzz_finds_nothing():
    """The campaign's own code, one round: `python -m tests.campaigns.fuzz --minutes N` runs it for longer."""
    rounds = iter((False, True))
    counts, failures = fuzz.run(random.Random(7).randrange(1000), lambda: next(rounds))
    assert not failures and sum(counts.values()) == sum(times for _, times in fuzz.KINDS.values())
