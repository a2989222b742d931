"""Nothing is published that was not looked at, and nothing is sent by a dry run."""

from __future__ import annotations

import os
import time

import pytest
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from finetune.errors import ConfigError
from finetune.export.errors import ExportError
from finetune.export.exporting import sweep
from finetune.export.manifest import write_manifest
from finetune.export.publish import push_folder
from finetune.export.sidecars import install, places


@pytest.fixture
def built(tmp_path):
    folder = tmp_path / "dist"
    folder.mkdir()
    save_file({"lora_A": torch.zeros(2)}, folder / "toy.safetensors")
    (folder / "README.md").write_text("# toy\n")
    write_manifest(folder)
    return folder


def test_a_dry_run_lists_everything_and_needs_no_network(built):
    """The list is what the upload takes, name by name."""
    sent = push_folder(built, "me/toy", dry_run=True)
    assert [name for name, _ in sent.files] == ["README.md", "manifest.json", "toy.safetensors"]
    assert sent.address.endswith("me/toy")


def test_what_was_changed_or_gives_something_away_is_not_sent(built):
    """A path in a log is as public as the weights."""
    (built / "notes.md").write_text("see /home/somebody/pictures/cat\n")
    with pytest.raises(ExportError, match="the path /home/somebody"):
        push_folder(built, "me/toy", dry_run=True)
    (built / "notes.md").unlink()
    save_file({"lora_A": torch.ones(2)}, built / "toy.safetensors")
    with pytest.raises(ConfigError, match="has changed since it was built"):
        push_folder(built, "me/toy", dry_run=True)


def test_a_card_may_be_edited_by_hand_but_not_given_away(built):
    """A model card is meant to be written on; the weights are not, and a private word stays at home."""
    (built / "README.md").write_text("# toy, drawn by hand\n")
    (told,) = push_folder(built, "me/toy", dry_run=True).notes
    assert "README.md was edited after the build" in told
    (built / "README.md").write_text("trained in /home/somebody/pictures\n")
    with pytest.raises(ExportError, match="the path /home/somebody"):
        push_folder(built, "me/toy", dry_run=True)


def test_a_file_larger_than_the_hub_takes_is_refused_before_hours_of_upload(built):
    """A Flux checkpoint in fp32 is beyond what the hub takes, and says so after the upload only."""
    os.truncate(built / "toy.safetensors", 51 * 10**9)
    with pytest.raises(ConfigError, match="51 GB, but the hub accepts at most 50 GB"):
        push_folder(built, "me/toy", dry_run=True)


def test_without_a_network_it_is_said_in_words(built, monkeypatch):
    """Nobody listens at this address; the library's own error is a hundred lines long."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(ExportError, match="me/toy could not be uploaded") as caught:
        push_folder(built, "me/toy")
    assert "with a network connection" in caught.value.text()


def test_pictures_and_headers_are_looked_through_too(built):
    """A PNG tells its prompt, a photo where it was taken, and a trainer's header the folder of the pictures."""
    papers = PngInfo()
    papers.add_text("workflow", "load C:\\Users\\jane\\cat.png")
    place = Image.Exif()
    place[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 8.0, 1.0)}
    Image.new("RGB", (8, 8)).save(built / "a.png", pnginfo=papers)
    Image.new("RGB", (8, 8)).save(built / "b.jpg", exif=place)
    save_file({"x": torch.zeros(1)}, built / "c.safetensors", metadata={"ss_train_data_dir": "/home/jane/cat"})
    (built / "d.safetensors").write_bytes(b"no tensors")
    (built / "manifest.json").unlink()
    with pytest.raises(ExportError) as caught:
        push_folder(built, "me/toy", dry_run=True)
    text = caught.value.text()
    assert "a.png holds the path C:" in text and "b.jpg holds the place where it was taken" in text
    assert "c.safetensors holds the path /home/jane/cat in ss_train_data_dir" in text
    assert "d.safetensors holds content that cannot be checked" in text and "toy.safetensors" not in text


def test_a_folder_without_a_card_is_refused_with_all_problems(tmp_path):
    with pytest.raises(ConfigError) as caught:
        push_folder(tmp_path, "toy", dry_run=True)
    assert "not OWNER/NAME" in caught.value.text()
    assert "finetune build" in caught.value.text()


def test_files_go_where_the_program_looks(built, tmp_path):
    """ComfyUI reads models/loras; a folder that is not ComfyUI's is a typing mistake, told before anything is done."""
    with pytest.raises(ConfigError, match="the folder of comfyui"):
        places(f"comfyui:{tmp_path / 'comfy'}", ["kohya"])
    loras = tmp_path / "comfy" / "models" / "loras"
    loras.mkdir(parents=True)
    assert places(f"comfyui:{tmp_path / 'comfy'}", ["kohya", "peft"]) == {"kohya": loras}
    both = places(f"comfyui:{tmp_path / 'comfy'}", ["kohya", "embeddings"])
    assert not both["embeddings"].exists()
    assert install(built / "toy.safetensors", both["embeddings"])[0].parent == loras.with_name("embeddings")
    assert install(built / "toy.safetensors", loras) == [loras / "toy.safetensors"]
    assert (loras / "toy.safetensors").read_bytes() == (built / "toy.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="did you mean comfyui"):
        places("comfyiu:/x", [])
    with pytest.raises(ConfigError, match="export one of them"):
        places(f"comfyui:{tmp_path / 'comfy'}", ["peft"])


def test_what_killed_exports_left_is_swept_after_an_hour(tmp_path):
    """Another process may still be writing a younger one."""
    old, young, other = (tmp_path / name for name in (".export-12-0a0b0c0d", ".export-13", "kept"))
    for folder in (old, young, other):
        folder.mkdir()
    past = time.time() - 7200
    for folder in (old, other):
        os.utime(folder, (past, past))
    sweep(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".export-13", "kept"]
