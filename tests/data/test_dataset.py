"""From a folder to pictures: roles, weights, masks and verdicts as the rows say, near copies on one side only."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from data_tools.errors import DataToolsError
from finetune.data.captions import CaptionRules
from finetune.data.dataset import Reading, check_trigger, dataset_changes, fingerprint, load_pictures
from finetune.data.folder import check_folder
from finetune.data.split import groups, overlap, split_holdout
from finetune.errors import ConfigError, DataError
from tests.data.conftest import CUT, pictures_in


def rows(folder, *changes):
    """Replace the sidecars by metadata.jsonl; `changes` by picture."""
    for text in folder.glob("*.txt"):
        text.unlink()
    lines = [{"file_name": f"{i}.png", "text": f"picture {i}"} | change for i, change in enumerate(changes)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_row_says_role_repeats_and_weight(folder):
    """Class pictures, repeats and weights of single pictures come from the manifest."""
    rows(folder, {"repeats": 3, "loss_weight": 0.5}, {"role": "class", "loss_weight": 2}, {}, {"loss_weight": 0})
    reading = Reading(repeats=2, class_weight=0.25)
    one, prior, plain_one, silent = load_pictures(folder, CUT, reading)[0]
    assert (one.repeats, one.loss_weight, one.is_class) == (6, 0.5, False)
    assert (prior.repeats, prior.loss_weight, prior.is_class) == (1, 0.5, True)
    assert (plain_one.repeats, plain_one.loss_weight) == (2, 1.0)
    assert silent.loss_weight == 0
    assert prior.key == "class row/1.png", "a picture of the class folder may have the same name"


def test_a_weight_that_is_no_weight_is_refused_by_name(folder):
    """A typing error must not become a weight of 1."""
    rows(folder, {"loss_weight": "much"}, {"loss_weight": -1}, {}, {})
    with pytest.raises(DataError) as caught:
        pictures_in(folder)
    assert "0.png" in str(caught.value) and "'much'" in str(caught.value) and "1.png" in str(caught.value)


def test_a_dropped_picture_is_left_out_and_named(folder):
    """What `finetune data clean` or a person decided counts; nothing goes in silence."""
    rows(folder, {}, {"verdict": "drop", "verdict_reasons": "blur 3.1 < 8"}, {}, {"verdict": "review"})
    pictures, problems = load_pictures(folder, CUT)
    assert [p.path.name for p in pictures] == ["0.png", "2.png", "3.png"]
    assert any(p.file_name == "1.png" and "left out" in p.what and "blur 3.1" in p.why for p in problems)


def test_an_edited_caption_is_seen_whatever_its_file_time_says(folder):
    """Fault 50. `datasets` keys on the modification time and serves the old caption after an unzip."""
    import os

    before = pictures_in(folder)
    status = (folder / "0.txt").stat()
    (folder / "0.txt").write_text("picture X\n")
    os.utime(folder / "0.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = pictures_in(folder)
    assert dataset_changes(fingerprint(before), fingerprint(after)) == ["instance/0.png: a caption changed"]


def test_an_edited_picture_is_seen_whatever_its_file_time_says(folder):
    """Fault 46 and 50: the same for pixels, past the memory of earlier scans."""
    import os

    before = pictures_in(folder)
    status = (folder / "1.png").stat()
    Image.open(folder / "1.png").rotate(180).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert dataset_changes(fingerprint(before), fingerprint(pictures_in(folder))) == [
        "instance/1.png: the picture changed"
    ]


def test_a_changed_mask_is_another_dataset(folder):
    """A resumed run would go on with another loss."""
    before = fingerprint(pictures_in(folder))
    (folder / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(folder / "masks" / "0.png")
    assert dataset_changes(before, fingerprint(pictures_in(folder))) == ["instance/0.png: the mask changed"]
    off = load_pictures(folder, CUT, Reading(mask="off"))[0]
    assert dataset_changes(before, fingerprint(off)) == []


def test_the_trigger_is_demanded_of_subjects_and_forbidden_to_the_class(folder):
    """Both mistakes teach the wrong thing, and both are named at once."""
    rows(folder, {"text": "[trigger] dog"}, {"text": "a sks dog", "role": "class"}, {"text": "a dog"},
         {"text": "a {sks|big} dog"})  # fmt: skip
    with pytest.raises(DataError) as caught:
        check_trigger(pictures_in(folder), CaptionRules(trigger="sks"), 16)
    text = str(caught.value)
    assert "1.png" in text and "class picture and holds the trigger" in text
    assert "2.png: 'a dog' does not hold the trigger 'sks'" in text
    assert "3.png: 'a big dog' does not hold" in text
    assert "0.png" not in text
    with pytest.raises(DataError, match=r"0\.png.*data\.trigger is not set"):
        check_trigger(pictures_in(folder), CaptionRules(), 16)


@pytest.fixture
def copies(tmp_path):
    """Eight drawings; each of the first four in three more editions: smaller, as a JPEG, sharpened."""
    folder = tmp_path / "copies"
    folder.mkdir()
    generator = np.random.default_rng(3)
    for i in range(8):
        image = Image.new("RGB", (160, 160), tuple(generator.integers(0, 255, 3).tolist()))
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            corner, size = generator.integers(0, 120, 2), generator.integers(20, 80, 2)
            colour = tuple(generator.integers(0, 255, 3).tolist())
            pen.ellipse([*corner.tolist(), *(corner + size).tolist()], fill=colour)
        image.save(folder / f"{i}.png")
        if i < 4:
            image.resize((96, 96)).save(folder / f"{i} small.png")
            image.save(folder / f"{i} saved.jpg", quality=60)
            image.filter(ImageFilter.SHARPEN).save(folder / f"{i} sharp.png")
    return folder


def drawings(folder):
    return load_pictures(folder, CUT, Reading(template="a drawing"))[0]


def test_near_copies_are_found(copies):
    """Re-saved, resized and sharpened copies are one picture to a validation set."""
    pictures = drawings(copies)
    first = groups(pictures)
    assert [pictures[place].path.name for place in first] == [
        f"{i} saved.jpg" if int(i) < 4 else f"{i}.png" for i in (picture.path.name[0] for picture in pictures)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_near_copies_never_straddle_the_split(copies, seed):
    """Fault 45. A held-out picture whose copy is trained on shows no overfitting."""
    pictures = drawings(copies)
    training, held, problems = split_holdout(pictures, 5, seed)
    assert not {p.path.name[0] for p in training} & {p.path.name[0] for p in held}
    assert 1 <= len(held) <= 5 and len(training) + len(held) == len(pictures)
    assert bool(problems) == (len(held) < 5), "fewer than asked for is said"
    again = split_holdout(list(reversed(pictures)), 5, seed)
    assert {p.key for p in again[1]} == {p.key for p in held}


def test_removing_a_picture_leaves_the_split_of_the_others(copies):
    """A picture that is taken out must not send others from one side to the other, or no run could go on."""
    pictures = drawings(copies)
    training, held, _ = split_holdout(pictures, 6, seed=0)
    gone = training[-1]
    _, after, _ = split_holdout([p for p in pictures if p.key != gone.key], 6, seed=0)
    assert {p.key for p in after} == {p.key for p in held}


def test_a_holdout_that_copies_make_impossible_is_refused(copies):
    """Every group larger than the holdout: nothing can be set aside honestly."""
    for i in range(4, 8):
        (copies / f"{i}.png").unlink()
    with pytest.raises(ConfigError, match=r"groups of near copies, the smallest with 4"):
        split_holdout(drawings(copies), 2, seed=0)
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        split_holdout(drawings(copies), 16, seed=0)


def test_a_validation_folder_that_overlaps_is_told(copies, tmp_path):
    """Fault 45: copies between two folders, by name."""
    other = tmp_path / "validation"
    other.mkdir()
    shutil.move(copies / "5.png", other / "own.png")
    Image.open(copies / "6.png").resize((120, 120)).save(other / "copy.webp", quality=80)
    found = overlap(drawings(copies), drawings(other))
    assert [p.file_name for p in found] == ["validation/copy.webp"] and "6.png" in found[0].what


def test_a_picture_in_both_folders_is_refused(copies, tmp_path):
    """Fault 45: the same pixels in training and validation make every validation figure a lie."""
    other = tmp_path / "validation"
    other.mkdir()
    Image.open(copies / "6.png").save(other / "saved again.png", optimize=True)
    with pytest.raises(DataError, match=r"1 picture is in validation\.folder and trained on") as caught:
        overlap(drawings(copies), drawings(other))
    assert "validation/saved again.png shows the pixels of 6.png" in caught.value.text()
    assert "--against" in caught.value.text() and caught.value.exit_code == 3


def test_class_rows_are_never_held_out(folder):
    """Validation asks about the subject."""
    rows(folder, {"role": "class"}, {}, {}, {})
    training, held, _ = split_holdout(pictures_in(folder), 2, seed=1)
    assert len(held) == 2 and not any(p.is_class for p in held)
    assert sum(p.is_class for p in training) == 1


def test_what_must_be_imported_first_is_told_with_the_command(pictures, tmp_path):
    """A dataset id, a zip, parquet files: the next command stands in the message, before anything is loaded."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.parquet").write_bytes(b"PAR1")
    (tmp_path / "my photos.zip").write_bytes(b"PK")
    for place, words in (
        ("hub:owner/name", "`finetune data import hub:owner/name -o photos`"),
        ("owner/name", "or, if it is a dataset of the hub"),
        (str(tmp_path / "my photos.zip"), f"`finetune data import '{tmp_path}/my photos.zip' -o photos`"),
        (str(tmp_path / "nothing"), "name the folder that holds the pictures"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            check_folder("data.folder", Path(place))
    check_folder("data.folder", pictures)
    with pytest.raises(DataToolsError, match=r"no picture in .*finetune data import .*shards"):
        load_pictures(tmp_path / "shards", CUT)


def test_what_was_done_to_pictures_to_read_them_is_told_once(folder):
    """A frame chosen or a background put behind them is a decision about the training data."""
    for i in range(2):
        Image.new("RGBA", (64, 64), (200, 30, 30, 128)).save(folder / f"clear{i}.png")
        (folder / f"clear{i}.txt").write_text("a clear picture")
    told = [problem.what for problem in load_pictures(folder, CUT)[1] if not problem.file_name]
    assert told == ["2 pictures: alpha composited on white"]
