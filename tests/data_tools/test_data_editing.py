"""Captions changed at once: shown first, done as shown, undone to the byte, never over somebody's own change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_tools import editing
from data_tools.editing import Edit, parse_pattern
from data_tools.errors import UsageError
from data_tools.scan import scan
from data_tools.wording import Wording
from tests.data_tools.test_data_cli import flat, run

__all__ = ["run"]


@pytest.fixture
def photos(tmp_path, save) -> Path:
    """Three captioned pictures: one caption, two captions, a folder of its own."""
    save("set/a.png", tint=1, caption="1girl, Red Hair, smile\r\n")
    save("set/b.png", tint=2, caption="a hound in the snow\n\na hound, red hair\n")
    save("set/10_sks dog/c.png", tint=3, caption="red hair,hat")
    return tmp_path / "set"


def texts(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.txt")}


@pytest.mark.parametrize(
    "edit, before, after",
    [
        (Edit(remove=("red hair",)), "1girl, Red  Hair, red hair, smile", "1girl, Red  Hair, smile"),
        (Edit(remove=("red",)), "red hair, a red", "red hair, a red"),
        (Edit(add=("Hat", "sun")), "a dog,  hat", "a dog, hat, sun"),
        (Edit(remove=("x",)), "left  as it is ,y", "left  as it is ,y"),
        (Edit(wording=Wording(rewords=(("hound", "dog"),))), "Hound, hounds", "dog, hounds"),
        (Edit(patterns=(parse_pattern(r"s/(\d+)girls?/\1 women/"),)), "2girls, 1girl", "2 women, 1 women"),
        (Edit(patterns=(parse_pattern("s|a/b|c|"),)), "a/b", "c"),
        (Edit(wording=Wording(trigger="sks")), "a dog", "sks, a dog"),
        (Edit(remove=("dog",)), "dog", ""),
    ],
)
def test_an_edit_does_one_thing_and_twice_is_once(edit, before, after):
    """Tags are whole tags, words are whole words, and a caption that nothing is said about keeps its spaces."""
    assert edit(before) == after and edit(after) == after


@pytest.mark.parametrize("text", ["", "s", "s/a/b", "s/a", "s//b/", "s/a/b/g", "x/a/b/", "s/(/b/", r"s/a/\1/", "sabab"])
def test_a_pattern_that_cannot_be_followed_is_refused(text):
    """Half a substitution would change thousands of files into something else."""
    with pytest.raises(UsageError, match="--regex"):
        parse_pattern(text)


def test_the_diff_comes_first_and_undo_gives_the_bytes_back(run, photos):
    """Nothing without --write; then as shown; two edits are taken back one after the other."""
    before = texts(photos)
    options = ("edit", photos, "--remove", "red hair", "--add", "outdoors")
    said = flat(run(*options).stdout)
    assert "- 1girl, Red Hair, smile + 1girl, smile, outdoors" in said and "4 of 4 captions change." in said
    assert texts(photos) == before and not (photos / ".finetune").exists()
    assert "Wrote 3 files" in run(*options, "--write").stdout
    once = texts(photos)
    assert once["b.txt"] == b"a hound in the snow, outdoors\n\na hound, outdoors\n"
    assert once["10_sks dog/c.txt"] == b"hat, outdoors"
    assert "0 of 4 captions change" in run(*options, "--write").stdout and texts(photos) == once
    run("edit", photos, "--reword", "hound=dog", "--write")
    assert [record.captions[0] for record in scan(photos).records][2] == "a dog in the snow, outdoors"
    assert "Would undo" in run("edit", photos, "--undo").stdout
    assert run("edit", photos, "--undo", "--write").returncode == 0 and texts(photos) == once
    assert run("edit", photos, "--undo", "--write").returncode == 0 and texts(photos) == before
    assert run("edit", photos, "--undo", "--write").returncode == 2


def test_an_edit_that_was_stopped_goes_on_and_is_taken_back_whole(run, photos, monkeypatch):
    """Ctrl-C between two of five thousand files must leave each of them whole, and the way back open."""
    before, written, whole = texts(photos), [], editing.write_atomic

    def write(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        whole(path, data)

    options = ("edit", photos, "--remove", "red hair", "--write")
    monkeypatch.setattr(editing, "write_atomic", write)
    stopped = run(*options)
    assert stopped.returncode == 130 and "Stopped. What was done is whole" in stopped.stderr
    monkeypatch.setattr(editing, "write_atomic", whole)
    assert "Wrote 2 files" in run(*options).stdout, "one was written before, and the journal of the edit before that"
    assert not any(b"ed hair" in data or b"ed Hair" in data for data in texts(photos).values())
    for _ in range(2):
        assert run("edit", photos, "--undo", "--write").returncode == 0
    assert texts(photos) == before


def test_the_manifest_is_edited_too_and_its_other_columns_stay(run, photos):
    """A manifest wins over text files: changed there only, or not there, an edit would do nothing."""
    run("scan", photos, "--write")
    path = photos / "metadata.jsonl"
    rows = [json.loads(line) | {"licence": "CC0"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    assert run("edit", photos, "--only", "10_sks dog/*", "--remove", "hat", "--write").returncode == 0
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert after[0] == rows[0] | {"text": "red hair"} and after[1:] == rows[1:]
    assert path.read_bytes().splitlines()[1:] == before.splitlines()[1:], "other lines are not written anew"
    assert texts(photos)["10_sks dog/c.txt"] == b"red hair" and b"Red Hair" in texts(photos)["a.txt"]
    assert scan(photos).records[0].captions == ("red hair",)


def test_what_somebody_changed_since_is_not_undone_over(run, photos):
    """An hour of work by hand is worth more than an undo."""
    run("edit", photos, "--add", "x", "--write")
    (photos / "a.txt").write_text("by hand")
    before = texts(photos)
    refused = run("edit", photos, "--undo", "--write")
    assert refused.returncode == 3 and "a.txt: was changed since" in refused.stderr and texts(photos) == before


def test_an_edit_cut_short_can_be_undone(run, photos, monkeypatch):
    """The disk fills up between two files: what was written goes back, what was not stays."""
    before, whole, written = texts(photos), os.replace, []

    def full(source, target):
        written.append(target)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert run("edit", photos, "--add", "x", "--write").returncode == 5
    assert texts(photos) != before
    assert run("edit", photos, "--undo", "--write").returncode == 0 and texts(photos) == before


def test_what_is_not_edited_is_told_and_wrong_input_refused(run, photos):
    """JSON beside a picture, a caption that is none, a damaged or hostile list of edits."""
    (photos / "a.txt").rename(photos / "a.caption")
    (photos / "b.txt").unlink()
    (photos / "b.json").write_text('{"text": "x"}')
    assert "b.json: is not edited" in flat(run("edit", photos, "--add", "x").stdout)
    assert run("edit", photos).returncode == run("edit", photos, "--undo", "--add", "x").returncode == 2
    refused = run("edit", photos, "--regex", "s/hat/<|endoftext|>/", "--write")
    assert refused.returncode == 3 and "c.txt: caption line 1 holds <|endoftext|>" in flat(refused.stderr)
    mark = photos / ".finetune/edits/0007.json"
    mark.parent.mkdir(parents=True)
    for content, words in (("{", "is damaged"), ('{"../x": {"before": "", "after": ""}}', "leads out of the folder")):
        mark.write_text(content)
        result = run("edit", photos, "--undo", "--write")
        assert result.returncode == 3 and words in flat(result.stderr) and not (photos.parent / "x").exists()
