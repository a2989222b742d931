"""The model card is valid for the hub and tells how to use the files; the manifest finds any changed byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finetune.export.card import Card, write_card
from finetune.export.errors import ExportError
from finetune.export.gallery import BEFORE_AFTER, data_rows, samples_of, write_gallery
from finetune.export.manifest import check_manifest, write_manifest

CARD = Card(
    title='The "sks" toy: a test',
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    trigger_words=("sks toy",),
    license="cc-by-4.0",
    kohya_file="sks-toy.safetensors",
    figures=[("subject fidelity", "0.83"), ("a|b", "1")],
    training=[("steps", "400")],
    gallery=[('sks toy: "red", #1', "samples/a.png")],
    data=[("pictures", "8 of the subject")],
    sheet="samples/sheet.png",
    architecture="stable-diffusion-xl-v1-base",
)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_embedded_base_is_named_by_where_a_reader_finds_it(tmp_path):
    """`from_pretrained("path/to/demo")` is a line that nobody can follow."""
    text = write_card(tmp_path, replace(CARD, base="demo")).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "from finetune.demo import BASE_DIR\n" in code and ".from_pretrained(BASE_DIR)\n" in code
    assert "path/to" not in text and "ships with `finetune`" in text


def test_front_matter_is_what_the_hub_reads(tmp_path):
    text = write_card(tmp_path, CARD).read_text()
    entries = front_matter(text)
    assert entries["base_model"] == CARD.base
    assert entries["instance_prompt"] == "sks toy"
    assert entries["tags"] == ["lora", "diffusers", "text-to-image", "template:sd-lora", "stable-diffusion-xl"]
    assert entries["widget"] == [{"text": 'sks toy: "red", #1', "output": {"url": "samples/a.png"}}]
    assert entries["license"] == "cc-by-4.0"
    assert "<Gallery />" in text, "the hub draws the widget's pictures where this stands"


def test_says_how_to_use_it_everywhere(tmp_path):
    text = write_card(tmp_path, CARD).read_text()
    assert 'load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")' in text
    assert "models/loras" in text
    assert "<lora:sks-toy:1>" in text
    assert "| subject fidelity | 0.83 |" in text
    assert "a\\|b" in text


def test_learned_words_are_loaded_before_they_are_prompted(tmp_path):
    """A prompt with a word that the pipeline was never taught draws plain characters."""
    words, whole = {"<toy>": "toy.safetensors"}, {"merged_folder": "merged", "single_file": "toy-merged.safetensors"}
    rows = [("learning rate", "0.0001 for unet, 0.03 for words"), ("Words", "<toy> (1 from 'toy')")]
    card = replace(CARD, trigger_words=("<toy>",), gallery=(), words=words, training=rows, **whole)
    text = write_card(tmp_path, card).read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    teach, ask = 'load_textual_inversion("embeddings/toy.safetensors", token="<toy>")', 'pipeline("a photo of <toy>")'
    assert snippet.index("load_lora_weights") < snippet.index(teach) < snippet.index(ask)
    assert "| Words | \\<toy> (1 from 'toy') |" in text, "Markdown takes <toy> for HTML"
    assert 'from_pretrained("merged")' in text and "`toy-merged.safetensors`" in text
    alone = replace(card, words_alone=True, diffusers_file="", kohya_file="", encoders={"clip_g": "text_encoder_2"})
    text = write_card(tmp_path, alone).read_text()
    assert front_matter(text)["tags"][:3] == ["textual_inversion", "diffusers", "text-to-image"]
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert 'load_file("embeddings/toy.safetensors")["clip_g"]' in snippet and "tokenizer_2" in snippet
    assert "load_lora_weights" not in snippet and "lora" not in front_matter(text)["tags"]


def test_base_that_is_no_hub_id_is_not_claimed_to_be_one(tmp_path):
    text = write_card(tmp_path, Card(title="t", base="demo")).read_text()
    assert "base_model" not in front_matter(text)
    assert "`demo`" in text


def test_a_missing_licence_is_said_and_how_to_state_one(tmp_path):
    """Without one nobody may spread the files, which most authors do not mean."""
    assert "published under `cc-by-4.0`" in write_card(tmp_path, CARD).read_text()
    text = write_card(tmp_path, Card(title="t", base="demo", author="Jane")).read_text()
    assert "Made by Jane. No licence is stated" in text and "`export.license`" in text
    assert "license" not in front_matter(text)
    assert "## Results" not in text and "Gallery" not in text


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


def test_data_is_told_in_numbers_only(tmp_path):
    """Names of files and captions are the author's own business."""
    def picture(caption, bucket, mask=None):
        return ["0" * 64, [caption], bucket, [0, 0], 1, 1.0, mask]

    dataset = {
        "instance/jane.png": picture("sks jane at home", [64, 96]),
        "instance/2.png": picture("sks", [64, 96], "1" * 64),
        "instance/3.png": picture("sks", [96, 64]),
        "class/4.png": picture("a woman", [64, 64]),
    }
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    assert dict(data_rows(tmp_path, 0.1)) == {
        "pictures": "3 of the subject, 1 of its class",
        "resolution in pixels": "96 x 64 (2), 64 x 96 (1)",
        "captions": "2 different, 1 to 4 words",
        "masks": "1 of 3 pictures; weight outside 0.1",
    }


def test_the_gallery_shows_the_newest_pictures_bare(tmp_path):
    """Prompts without the settings behind them; what was asked before and is no longer is left behind."""
    papers = PngInfo()
    papers.add_text("parameters", "made in /home/jane")
    asked = {"prompts": ["a cat --d 7", "a dog"], "per_prompt": 2}
    for number, step in enumerate(("step-000000", "step-000010", "step-000020")):
        folder = tmp_path / "samples" / step
        folder.mkdir(parents=True)
        (folder / "questions.json").write_text(json.dumps(asked))
        for name in ("000-7", "000-8", "001-0", "001-1", "002-0"):
            Image.new("RGB", (8, 8), (100 * number, 0, 0)).save(folder / f"{name}.png", pnginfo=papers)
    gallery = write_gallery(samples_of(tmp_path), tmp_path)
    assert gallery == [
        ("a cat", "images/000-7.png"), ("a dog", "images/001-0.png"),
        ("a cat", "images/000-8.png"), ("a dog", "images/001-1.png"),
    ]  # fmt: skip
    with Image.open(tmp_path / "images" / "000-7.png") as picture:
        assert picture.getpixel((0, 0)) == (200, 0, 0) and not picture.info
    with Image.open(tmp_path / BEFORE_AFTER) as sheet:
        colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert {(0, 0, 0), (200, 0, 0)} <= colours and (100, 0, 0) not in colours


def test_a_run_without_samples_has_no_gallery(tmp_path):
    """Pictures of the base model alone would pass for the adapter's."""
    (tmp_path / "samples" / "step-000000").mkdir(parents=True)
    (tmp_path / "samples" / "step-000000" / "questions.json").write_text('{"prompts": ["a"], "per_prompt": 1}')
    assert samples_of(tmp_path) == [] and write_gallery([], tmp_path) == []
    assert not (tmp_path / "images").exists()
