"""Captioners that look: real model classes with random weights, through the command line, offline."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.captioners.tagger import readable
from data_tools.captioners.vision import VISION, Asking, open_viewer
from data_tools.errors import DataToolsError, UsageError
from data_tools.folder import list_folder
from tests.data_tools.test_data_cli import ROOT, flat, run
from tests.data_tools.tiny_captioners import BUILDERS, TAGS, wd_tagger

__all__ = ["run"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One folder for each captioner, as a download leaves it."""
    folders = {name: tmp_path_factory.mktemp(name) for name in BUILDERS}
    for name, build in BUILDERS.items():
        build(folders[name])
    return folders


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three pictures of different shapes, one of them in a folder."""
    return fill(tmp_path / "photos", 3)


def fill(folder: Path, count: int) -> Path:
    for number in range(count):
        path = folder / ("inner" if number == 1 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = ((12, 16, 3), (16, 9, 3), (20, 20, 3))[number % 3]
        noise = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(noise).resize((shape[1] * 4, shape[0] * 4)).save(path)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def test_every_captioner_is_tested():
    """A new entry of the table needs a tiny model here."""
    assert BUILDERS.keys() == VISION.keys()


@pytest.mark.parametrize("name", sorted(VISION))
def test_each_captioner_writes_a_file_for_each_picture(run, models, photos, name):
    """The whole way, from the command line to what scan reads; and first nothing is written."""
    options = ("--captions", name, "--model", models[name], "--length", "6")
    shown = run("caption", photos, *options)
    assert shown.returncode == 0 and "3 of 3 pictures; --write" in flat(shown.stdout) and not texts(photos)
    assert run("caption", photos, *options, "--write").returncode == 0
    assert list(texts(photos)) == ["0.txt", "2.txt", "inner/1.txt"] and all(texts(photos).values())
    assert run("scan", photos).returncode == 0


@pytest.mark.parametrize("name", sorted(VISION))
def test_a_batch_says_what_one_by_one_says(models, photos, name):
    """What lies beside a picture, and how much is filled up for it, must not change its caption."""
    viewer = open_viewer(name, Asking(str(models[name]), length=6, device="cpu"))
    images = [Image.open(photos / file) for file in list_folder(photos).pictures]
    together = viewer.say(images)
    assert together == [viewer.say([image])[0] for image in images]
    assert len({str(texts) for texts in together}) > 1, "the pictures make a difference"


def test_prompts_and_number_give_several_captions(run, models, photos):
    """One line for each; training picks one of them every time."""
    prompts = ("--prompt", "a dog", "--prompt", "the house on grass", "--number", "2", "--length", "4")
    run("caption", photos, "--captions", "smolvlm", "--model", models["smolvlm"], *prompts, "--write")
    assert all(3 <= len(text.splitlines()) <= 4 for text in texts(photos).values())
    begun = ("--captions", "blip", "--model", models["blip"], "--prompt", "big red", "--write", "--replace")
    run("caption", photos, *begun)
    assert all(text.startswith("big red ") for text in texts(photos).values())


def test_wording_is_applied_and_hand_written_captions_stay(run, models, photos):
    """Trigger first, suffix last; what somebody wrote is worth more."""
    (photos / "2.txt").write_text("by hand\n")
    tagger = ("--captions", "wd_tagger", "--model", models["wd_tagger"], "--general", "0.01", "--character", "1")
    words = ("--trigger", "sks", "--without", "1girl", "--reword", "long hair=mane", "--suffix", ", photo")
    result = run("caption", photos, *tagger, *words, "--write")
    assert result.returncode == 0 and "1 picture has a caption file already" in flat(result.stdout)
    found = texts(photos)
    assert found.pop("2.txt") == "by hand\n" and found["0.txt"] == "sks, ^_^, mane, red, photo\n"
    run("caption", photos, *tagger, "--write", "--replace")
    assert "by hand" not in texts(photos)["2.txt"]


def test_words_that_most_captions_share_are_told(run, models, tmp_path):
    """They learn what belongs to the subject, and the trigger does not."""
    options = ("--captions", "wd_tagger", "--model", models["wd_tagger"], "--general", "0.01", "--character", "1")
    result = run("caption", fill(tmp_path / "set", 5), *options, "--trigger", "sks girl", "--write")
    assert "share these words: 1girl 100%, hair 100%, long 100%, red 100%" in flat(result.stdout)
    assert "share" not in run("caption", tmp_path / "set", *options, "--write", "--replace").stdout


def test_a_killed_run_goes_on_where_it_was(models, tmp_path):
    """Hours of captions must not be lost; what is written is whole."""
    folder = fill(tmp_path / "set", 150)
    command = [sys.executable, "-m", "data_tools", "caption", folder, "--captions", "wd_tagger", "--batch", "1"]
    command += ["--model", models["wd_tagger"], "--write"]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(texts(folder)) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: (folder / name).stat().st_mtime_ns for name in texts(folder)}
    assert 2 <= len(before) < 150
    again = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and f"Wrote {150 - len(before)} caption files" in flat(again.stdout)
    assert len(texts(folder)) == 150 and all(texts(folder).values())
    assert all((folder / name).stat().st_mtime_ns == when for name, when in before.items())


def test_several_processes_share_the_pictures(run, models, tmp_path, monkeypatch):
    """As `accelerate launch` starts them, also when one begins late; together they write what one writes."""
    tagger = ("--captions", "wd_tagger", "--model", models["wd_tagger"], "--write")
    alone, together = fill(tmp_path / "alone", 7), fill(tmp_path / "together", 7)
    run("caption", alone, *tagger)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("1", 4), ("0", 7)):
        monkeypatch.setenv("RANK", rank)
        result = run("caption", together, *tagger)
        assert result.returncode == 0 and len(texts(together)) == count
        assert ("Wrote 3 caption files" in result.stdout) == (rank == "0")
    assert texts(together) == texts(alone)


def test_a_picture_that_cannot_be_read_stops_no_other(run, models, photos):
    """It is named at the end, and the exit code says that the folder is not done."""
    (photos / "1 broken.png").write_bytes(b"\x89PNG not")
    result = run("caption", photos, "--captions", "wd_tagger", "--model", models["wd_tagger"], "--write")
    assert result.returncode == 3 and "1 broken.png" in result.stderr and len(texts(photos)) == 3


def test_caption_files_that_somebody_else_reads_are_not_touched(run, models, photos):
    """An unreadable one stays; `.caption` is replaced in place; two pictures of one name cannot share."""
    (photos / "0.txt").write_bytes(b"caf\xe9")
    (photos / "2.caption").write_text("old")
    options = ("--captions", "wd_tagger", "--model", models["wd_tagger"], "--write")
    assert run("caption", photos, *options).returncode == 0
    assert (photos / "0.txt").read_bytes() == b"caf\xe9" and (photos / "2.caption").read_text() == "old"
    assert run("caption", photos, *options, "--replace").returncode == 0
    assert "1girl" in (photos / "2.caption").read_text() and not (photos / "2.txt").exists()
    shutil.copy(photos / "0.png", photos / "0.webp")
    (photos / "0.txt").unlink()
    result = run("caption", photos, *options)
    assert result.returncode == 3 and "0.webp: shares its caption file with 0.png" in result.stderr


def test_pickled_weights_are_refused(models, tmp_path):
    """A pickle runs code when it is opened."""
    shutil.copytree(models["blip"], tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(DataToolsError, match=r"pytorch_model.bin only.*pickle") as caught:
        open_viewer("blip", Asking(str(tmp_path / "model")))
    assert caught.value.exit_code == 8


def test_missing_weights_are_refused(models, tmp_path):
    """transformers would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(models["qwen_vl"], tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file(dict(list(weights.items())[3:]), tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="lacks 3 weights of a Qwen2VLForConditionalGeneration"):
        open_viewer("qwen_vl", Asking(str(tmp_path / "model")))


def test_wrong_options_say_what_to_do(run, models, photos, tmp_path, monkeypatch):
    """Before any model is loaded, wherever that is possible."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    blip, tagger = str(models["blip"]), str(models["wd_tagger"])
    for options, words in (
        (("florence2", "--model", blip), "is a 'blip' model, and --captions florence2 reads florence2; use --captions"),
        (("blip", "--model", "./nowhere"), "neither a folder that is there nor a hub id"),
        (("blip", "--model", blip, "--revision", "x"), "is for hub ids"),
        (("blip",), "hf download Salesforce/blip-image-captioning-large --local-dir"),
        (("wd_tagger",), "hf download SmilingWolf/wd-vit-tagger-v3 --local-dir"),
        (("blip", "--model", str(tmp_path)), "cannot be loaded"),
        (("blip", "--model", blip, "--device", "cuda:99"), "cannot be used here"),
        (("wd_tagger", "--model", tagger, "--prompt", "x"), "leave out --prompt"),
        (("wd_tagger", "--model", blip), "holds no model.onnx"),
        (("florence2", "--model", str(models["florence2"]), "--prompt", "<OD>"), "does not answer in words"),
        (("blip", "--model", blip, "--length", "256"), "it has 256 places"),
        (("filename", "--model", blip), "asks no model"),
        (("blip", "--template", "x"), "never uses it"),
        (("blip", "--model", blip, "--trigger", " "), "one of them is empty"),
        (("blip", "--model", blip, "--reword", "red"), "holds no '='"),
    ):
        result = run("caption", photos, "--captions", *options)
        assert result.returncode == 2 and words in flat(result.stderr), (options, result.stderr)


def test_taggers_of_every_export_are_read(tmp_path, photos):
    """Some hold one picture at a time; a table of another model is told."""
    images = [Image.open(photos / name) for name in list_folder(photos).pictures]
    one, many = wd_tagger(tmp_path / "one", batch=1), wd_tagger(tmp_path / "many")
    said = open_viewer("wd_tagger", Asking(str(many))).say(images)
    assert said == open_viewer("wd_tagger", Asking(str(one))).say(images)
    assert "sensitive" not in str(said), "a rating is no tag"
    wd_tagger(tmp_path / "other", tags=TAGS[:5])
    with pytest.raises(UsageError, match=r"tells 6 tags, but selected_tags.csv lists 5"):
        open_viewer("wd_tagger", Asking(str(tmp_path / "other")))
    (tmp_path / "one/model.onnx").write_bytes(b"no graph")
    with pytest.raises(UsageError, match="cannot be opened"):
        open_viewer("wd_tagger", Asking(str(tmp_path / "one")))


@pytest.mark.parametrize("tag, words", [("long_hair", "long hair"), ("^_^", "^_^"), ("o_o", "o_o"), ("1girl", "1girl")])
def test_underscores_are_spaces_but_not_in_faces(tag, words):
    """As taggers' users write them."""
    assert readable(tag) == words
