"""Captions: where they come from, in which order, and what is said when there is none."""

from __future__ import annotations

import csv
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.captioners import CAPTIONERS
from data_tools.errors import RefusedError, UsageError
from data_tools.scan import scan
from data_tools.text import decode_text, split_captions


def told(result, severity: str | None = None) -> str:
    return "\n".join(f"{p.severity}: {p}" for p in result.problems if severity in (None, p.severity))


def rows(folder, *values) -> None:
    lines = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", sorted(CAPTIONERS))
def test_every_captioner_answers_or_names_each_picture(tmp_path, save, name):
    """The protocol: a captioner never leaves a picture out without a reason, and writes nothing."""
    save("3_grey cat/one cat.png", tint=1, caption="a caption")
    save("IMG_0001.png", tint=2)
    before = sorted(tmp_path.rglob("*"))
    result = scan(tmp_path, captions=name, template="a {stem}" if name == "template" else None)
    named = {problem.file_name for problem in result.problems if problem.severity == "error"}
    for picture in ("3_grey cat/one cat.png", "IMG_0001.png"):
        assert picture in {record.file_name for record in result.records} | named or "" in named
    assert sorted(tmp_path.rglob("*")) == before and CAPTIONERS[name].__doc__


def test_auto_takes_sidecar_then_folder_then_template(tmp_path, save):
    """The order is a promise: the more particular word wins."""
    save("10_sks dog/a.png", tint=1, caption="my own words")
    save("10_sks dog/b.png", tint=2)
    save("c.png", tint=3)
    result = scan(tmp_path, template="a photo of {stem}")
    assert [(r.captions, r.source, r.repeats) for r in result.records] == [
        (("my own words",), "sidecar", 10),
        (("sks dog",), "kohya folder", 10),
        (("a photo of c",), "template", 1),
    ]
    assert "10 repeats of 'sks dog'" in told(result, "note")
    assert "kohya's trainers would skip it" in told(result, "warning")


def test_without_any_caption_the_error_says_what_to_do(tmp_path, save):
    """File names are no captions unless asked for: IMG_0001 teaches nothing."""
    save("a sunny day.png")
    result = scan(tmp_path)
    assert result.records == [] and "error: a sunny day.png: has no caption" in told(result)
    assert "--template" in told(result) and "--captions filename" in told(result)
    assert scan(tmp_path, captions="filename").records[0].captions == ("a sunny day",)


@pytest.mark.parametrize(
    "name, words",
    [
        ("sks_dog-on grass (2)", "sks dog on grass"),
        ("a cat 01", "a cat"),
        ("IMG_2034", None),
        ("0012", None),
        ("DSCF1", None),
        ("PXL_2024", None),
    ],
)
def test_filename_captions_drop_counters_and_refuse_camera_names(tmp_path, save, name, words):
    """A counter is no word, and a camera's name describes nothing."""
    save(f"{name}.png")
    result = scan(tmp_path, captions="filename")
    assert [r.captions for r in result.records] == ([(words,)] if words else [])
    assert ("describes nothing" in told(result, "error")) == (words is None)


def test_only_exactly_the_same_stem_counts(tmp_path, save):
    """Peers give my.txt to my_photo_of_a_cat.png."""
    save("my_photo_of_a_cat.png")
    (tmp_path / "my.txt").write_text("wrong")
    result = scan(tmp_path)
    assert result.records == [] and "my.txt: is a text file without a picture" in told(result, "warning")


def test_a_sidecar_is_found_across_unicode_forms(tmp_path, save):
    """The picture came from a Mac (decomposed), the caption from an editor (composed)."""
    save(unicodedata.normalize("NFD", "café.png"))
    (tmp_path / unicodedata.normalize("NFC", "café.caption")).write_text("a café")
    assert scan(tmp_path).records[0].captions == ("a café",)


def test_lines_of_a_sidecar_are_several_captions(tmp_path, save):
    """Training draws one of them each time; blank lines and trailing blanks are no captions."""
    save("a.png", caption="first \r\n\r\n  second\rthird\n\n")
    assert scan(tmp_path).records[0].captions == ("first", "second", "third")


def test_two_sidecars_must_agree_and_a_shared_one_is_told(tmp_path, save):
    """Picking one of two different captions would be a guess."""
    save("a.png", tint=1, caption="one")
    (tmp_path / "a.caption").write_text("two")
    save("b.png", tint=2, caption="same")
    save("b.bmp", tint=3)
    (tmp_path / "b.caption").write_text("same\n")
    result = scan(tmp_path)
    assert [r.file_name for r in result.records] == ["b.bmp", "b.png"]
    assert "error: a.png: has two captions that differ" in told(result)
    assert "is the caption of 2 pictures" in told(result, "warning")


@pytest.mark.parametrize(
    "data",
    [
        "naïve ☃".encode("utf-8-sig"),
        "naïve ☃".encode("utf-16"),
        "naïve ☃\r\n".encode(),
        b"\xfe\xff" + "naïve ☃".encode("utf-16-be"),
        "naïve ☃".encode("utf-32"),
    ],
)
def test_byte_order_marks_are_read_and_removed(tmp_path, save, data):
    """A mark that stays becomes a token of its own; peers train on it."""
    save("a.png")
    (tmp_path / "a.txt").write_bytes(data)
    assert scan(tmp_path).records[0].captions == ("naïve ☃",)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"fine\nna\xefve", ("line 2", "byte 8", "0xef")),
        (b"a\r\nb\0c", ("line 2", "byte 5", "NUL")),
        ("x".encode("utf-16")[:-1], ("line 1", "byte 3", "UTF-16")),
        (b"a \x1b[31m", ("control character U+001B",)),
        (b"a cat <|endoftext|> on a mat", ("<|endoftext|>",)),
        (b"x" * (2**20 + 1), ("1,048,577 bytes",)),
    ],
)
def test_captions_that_cannot_be_read_name_the_place(tmp_path, save, data, words):
    """Latin-1, NUL, half a UTF-16 character: file, line and byte, so that an editor can go there."""
    save("a.png")
    (tmp_path / "a.txt").write_bytes(data)
    result = scan(tmp_path)
    assert result.records == [] and all(word in told(result, "error") for word in ("a.txt", *words))
    assert told(result, "error").count("error:") == 1


@pytest.mark.parametrize("text", ["", " \n\t\r\n", "\ufeff"])
def test_an_empty_caption_is_kept_and_listed(tmp_path, save, text):
    """No words can be meant (unconditional training), but never without being told."""
    save("a.png", caption=text)
    result = scan(tmp_path)
    assert result.records[0].captions == ("",) and "a.txt: is an empty caption" in told(result, "warning")


@given(st.binary(max_size=60))
def test_any_bytes_are_captions_or_refused(data):
    """Fuzzing the caption reader: text without control characters, or words on what is wrong."""
    try:
        captions = split_captions(decode_text(data))
    except RefusedError as refusal:
        assert refusal.what and refusal.remedy
    else:
        assert captions and all(caption == caption.strip() and "\n" not in caption for caption in captions)


@pytest.mark.parametrize(
    "template, word",
    [
        ("a {name}", "not known"),
        ("a {stem.__class__}", "not known"),
        ("a {", "cannot be read"),
        ("a {stem!r}", "not known"),
        ("a {stem:>900000000}", "not known"),
        ("  ", "empty"),
        ("a {}", "not known"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(tmp_path, save, template, word):
    """A format string can read attributes and fill memory; only the documented blanks are filled."""
    save("a.png")
    with pytest.raises(UsageError, match=word) as caught:
        scan(tmp_path, template=template)
    assert caught.value.exit_code == 2


def test_template_blanks(tmp_path, save):
    """What each blank stands for, and that braces can be written."""
    save("5_red car/one.png", tint=1)
    save("two.png", tint=2)
    result = scan(tmp_path, captions="template", template="{{a}} {folder}, {stem} {number}\nplain")
    assert [r.captions for r in result.records] == [
        ("{a} red car, one 1", "plain"),
        (f"{{a}} {tmp_path.name}, two 2", "plain"),
    ]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"captions": "magic"}, "choose one of auto, sidecar"),
        ({"captions": "template"}, "needs a template"),
        ({"captions": "sidecar", "template": "x"}, "never uses it"),
    ],
)
def test_choices_that_cannot_be_followed_are_refused(tmp_path, save, options, word):
    """An option that would be ignored is a mistake to be told, not to be passed over."""
    save("a.png")
    with pytest.raises(UsageError, match=word):
        scan(tmp_path, **options)


def test_kohya_folders_that_look_like_years_are_warned_about(tmp_path, save):
    """`2024_holiday` would otherwise be 2024 repeats, in silence."""
    save("2024_holiday/a.png", tint=1)
    result = scan(tmp_path)
    assert result.records[0].repeats == 2024 and "looks like a year" in told(result, "warning")
    inner = scan(tmp_path / "2024_holiday", captions="template", template="x")
    assert inner.records[0].repeats == 1 and "give its parent folder" in told(inner, "note")


def test_metadata_wins_and_a_differing_sidecar_is_told(tmp_path, save):
    """After `scan --write` an edited text file would otherwise be ignored in silence."""
    save("a.png", caption="edited later")
    rows(tmp_path, {"file_name": "a.png", "text": "from the row", "repeats": 3, "role": "class"})
    result = scan(tmp_path)
    assert [(r.captions, r.source, r.repeats, r.role) for r in result.records] == [
        (("from the row",), "metadata", 3, "class")
    ]
    assert "--captions sidecar --write" in told(result, "warning")
    assert scan(tmp_path, captions="sidecar").records[0].captions == ("edited later",)


def test_rows_and_pictures_must_match(tmp_path, save):
    """`datasets` drops a picture without a row in silence, and takes a second row in silence."""
    save("a.png", tint=1)
    save("extra.png", tint=2)
    rows(
        tmp_path,
        {"file_name": "a.png", "text": "x"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "./a.png", "text": "y"},
        {"file_name": "A.png", "text": "y"},
    )
    result = scan(tmp_path)
    assert [r.file_name for r in result.records] == ["a.png"]
    for words in (
        "extra.png: has no row",
        "line 2: names 'gone.png'; there is no such picture",
        "line 3: names a.png again, after metadata.jsonl line 1",
        "but the file is called 'a.png'",
    ):
        assert words in told(result, "error"), words


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/secret.png",
        "http://host/a.png",
        "sub/../../secret.png",
        "C:\\secret.png",
        "..\\secret.png",
        "",
        7,
        "a\0.png",
    ],
)
def test_rows_cannot_lead_out_of_the_folder(tmp_path, save, name):
    """Metadata from a stranger must not pull other files of this machine into training."""
    save("data/a.png")
    save("secret.png", tint=3)
    rows(tmp_path / "data", {"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "leak"})
    result = scan(tmp_path / "data")
    assert [r.file_name for r in result.records] == ["a.png"]
    assert "line 2: names" in told(result, "error") and "only files inside the folder" in told(
        result, "error"
    )


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"file_name": "a.png", "text": "x', ("metadata.jsonl line 2: is not JSON at column",)),
        ("[1]", ("holds list",)),
        ({"text": "x"}, ("line 2: has no file_name",)),
        ({"file_name": "a.png"}, ("has no text",)),
        ({"file_name": "a.png", "text": None}, ("null",)),
        ({"file_name": "a.png", "text": 5}, ("int, not text",)),
        ({"file_name": "a.png", "text": "x", "repeats": 0}, ("repeats 0",)),
        ("[" * 100_000, ("not ",)),
        ({"file_name": "a.png", "text": "x", "repeats": True}, ("repeats True",)),
        ({"file_name": "a.png", "text": "x", "role": "style"}, ("role 'style'", "instance and class")),
        ('{"file_name": "a.png", "text": "x", "repeats": ' + "9" * 5000 + "}", ("not ",)),
        ({"file_name": "a.png", "text": "\x1b[31mred"}, ("control character",)),
        ({"file_name": "a.png", "text": "a <|endoftext|> b"}, ("<|endoftext|>",)),
    ],
)
def test_rows_that_cannot_be_used_name_line_and_column(tmp_path, save, row, words):
    """ "Row 1 is broken" helps nobody with ten thousand rows."""
    save("a.png", tint=1)
    save("b.png", tint=2)
    rows(tmp_path, {"file_name": "b.png", "text": "fine"}, row)
    result = scan(tmp_path)
    assert [r.file_name for r in result.records] == ["b.png"]
    assert all(word in told(result, "error") for word in words), told(result)


def test_empty_text_in_a_row_is_kept_and_listed(tmp_path, save):
    """As for an empty text file."""
    save("a.png")
    rows(tmp_path, {"file_name": "a.png", "text": " "})
    assert scan(tmp_path).records[0].captions == ("",) and "empty caption" in told(scan(tmp_path), "warning")


def test_csv_metadata_is_read_and_its_broken_rows_named(tmp_path, save):
    """A comma in an unquoted caption is the classic; it must not cut the caption short."""
    save("a.png", tint=1)
    save("b.png", tint=2)
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["file_name", "text", "repeats"], ["a.png", "a dog, sitting", "2"]])
        file.write("b.png,a cat, lying,3\n")
    result = scan(tmp_path)
    assert [(r.captions, r.repeats) for r in result.records] == [(("a dog, sitting",), 2)]
    assert "metadata.csv line 3: does not have the 3 columns" in told(result, "error")


def test_lists_and_lines_in_a_row_are_several_captions(tmp_path, save):
    """One rule for all places: a line is a caption."""
    save("a.png", tint=1)
    save("b.png", tint=2)
    rows(
        tmp_path,
        {"file_name": "a.png", "text": ["one", "two"]},
        {"file_name": "b.png", "caption": "one\ntwo"},
    )
    assert [r.captions for r in scan(tmp_path).records] == [("one", "two")] * 2


def test_a_row_finds_its_picture_across_unicode_forms(tmp_path, save):
    """`datasets` fails on a decomposed name; the record carries the name on disk."""
    name = unicodedata.normalize("NFD", "café.png")
    save(name)
    rows(tmp_path, {"file_name": unicodedata.normalize("NFC", "café.png"), "text": "x"})
    assert scan(tmp_path).records[0].file_name == name


def test_masks_are_not_trained_on_and_must_fit(tmp_path, save):
    """A mask is named by the row of its picture; a mask of another size would weigh the wrong pixels."""
    for name, tint in (("a.png", 1), ("b.png", 2), ("c.png", 3)):
        save(name, 40, 30, tint)
    save("masks/a.png", 40, 30, 4)
    save("masks/b.png", 30, 40, 5)
    rows(tmp_path, *({"file_name": f"{n}.png", "text": n, "mask_file_name": f"masks/{n}.png"} for n in "abc"))
    result = scan(tmp_path)
    assert [(r.file_name, r.mask_file) for r in result.records] == [("a.png", "masks/a.png")]
    assert "b.png: has a mask of 30 x 40" in told(result, "error") and "masks/c.png" in told(result, "error")
