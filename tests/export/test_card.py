"""The model card is valid for the hub and tells how to use the files; the manifest finds any changed byte."""

from __future__ import annotations

import json

import pytest
import yaml

from finetune.export import Card, ExportError, check_manifest, write_card, write_manifest

CARD = Card(
    title='The "sks" toy: a test',
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    trigger_words=("sks toy",),
    license="cc-by-4.0",
    kohya_file="sks-toy.safetensors",
    figures=[("subject fidelity", "0.83"), ("a|b", "1")],
    training=[("steps", "400")],
    gallery=[('sks toy: "red", #1', "samples/a.png")],
    sheet="samples/sheet.png",
)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_is_what_the_hub_reads(tmp_path):
    text = write_card(tmp_path, CARD).read_text()
    entries = front_matter(text)
    assert entries["base_model"] == CARD.base
    assert entries["instance_prompt"] == "sks toy"
    assert entries["tags"] == ["lora", "diffusers", "text-to-image", "stable-diffusion", "template:sd-lora"]
    assert entries["widget"] == [{"text": 'sks toy: "red", #1', "output": {"url": "samples/a.png"}}]
    assert entries["license"] == "cc-by-4.0"


def test_says_how_to_use_it_everywhere(tmp_path):
    text = write_card(tmp_path, CARD).read_text()
    assert 'load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")' in text
    assert "models/loras" in text
    assert "<lora:sks-toy:1>" in text
    assert "| subject fidelity | 0.83 |" in text
    assert "a\\|b" in text


def test_base_that_is_no_hub_id_is_not_claimed_to_be_one(tmp_path):
    text = write_card(tmp_path, Card(title="t", base="demo")).read_text()
    assert "base_model" not in front_matter(text)
    assert "`demo`" in text


def test_private_card_is_refused(tmp_path):
    with pytest.raises(ExportError, match="/home/jane/cat"):
        write_card(tmp_path, Card(title="t", base="demo", notes=["made in /home/jane/cat"]))
    assert not list(tmp_path.iterdir())


def test_manifest_finds_every_change(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.png").write_bytes(b"picture")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / ".hidden").write_text("not ours")
    path = write_manifest(tmp_path)
    first = path.read_bytes()
    assert list(json.loads(first)["files"]) == ["b.txt", "samples/a.png"]
    assert write_manifest(tmp_path).read_bytes() == first
    assert check_manifest(tmp_path) == []
    (tmp_path / "b.txt").write_text("tixt")
    (tmp_path / "samples" / "a.png").write_bytes(b"pictures")
    assert check_manifest(tmp_path) == [
        "b.txt has other content than when it was listed.",
        "samples/a.png has 8 bytes and should have 7.",
    ]
    (tmp_path / "b.txt").unlink()
    assert check_manifest(tmp_path)[0] == "b.txt is missing."
