"""Rows of the fault matrix that only a training run can answer; `docs/faults.md` lists who answers the others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from finetune import make_run, train
from finetune.data.dataset import load_pictures, long_captions
from finetune.errors import DataError
from finetune.families import load_family
from tests.conftest import command
from tests.data.conftest import CUT
from tests.data.test_cache import encoded


@pytest.fixture
def broken(folder):
    """Three of four pictures cannot be read, each for another reason."""
    data = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(data[: len(data) // 2])
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_bytes(b"<!DOCTYPE html><title>404</title>")
    return folder


REASONS = ("0.png: is truncated", "1.png: is empty (0 bytes)", "2.png: is not a picture", "DOCTYPE")


def test_every_broken_picture_is_named_at_once(broken):
    """Fault 27. Peers stop at the first one, or at the step that meets it, or name none."""
    with pytest.raises(DataError) as caught:
        load_pictures(broken, CUT)
    assert caught.value.exit_code == 3 and all(words in str(caught.value) for words in REASONS)
    assert "3.png" not in str(caught.value)


@pytest.mark.parametrize("name", ["train", "plan"])
def test_broken_pictures_end_a_command_before_the_first_step(broken, document, tmp_path, monkeypatch, capsys, name):
    """Fault 27, as a user meets it: code 3, no checkpoint, nothing encoded."""
    recipe = tmp_path / "recipe.json"
    document["data"] = document["data"] | {"folder": str(broken)}
    recipe.write_text(json.dumps(document))
    told = command(capsys, monkeypatch, name, recipe, expect=3)
    assert all(words in told for words in REASONS) and "Traceback" not in told
    assert not list(tmp_path.rglob("checkpoint-*")) and not list(tmp_path.rglob("shard-*"))


def test_a_caption_that_is_too_long_is_told_with_its_numbers(folder):
    """Fault 40. Peers cut at 77 tokens in silence."""
    (folder / "1.txt").write_text("a dog " * 60)
    pictures, _ = load_pictures(folder, CUT)
    family, components = load_family("demo")
    room = {name: family.token_limit(name, tokenizer) for name, tokenizer in components.tokenizers.items()}
    (line,) = long_captions(pictures, components.tokenizers, room)
    tokens = len(components.tokenizers["text_encoder"]("a dog " * 60).input_ids)
    assert line.startswith(f"1.png: the caption has {tokens} tokens, text_encoder reads {room['text_encoder']}")
    assert f"the last {tokens - room['text_encoder']} have no effect" in line


def test_a_moved_focus_is_another_cut(folder, tmp_path):
    """Fault 46. The file and the bucket are the same; what is seen of it is not."""
    Image.effect_noise((240, 80), 80).convert("RGB").save(folder / "0.png")
    rows, square = [{"file_name": f"{i}.png", "text": "x"} for i in range(4)], replace(CUT, multiple=64)
    focus = [{}, {"focus_x": 0.1, "focus_y": 0.5}, {"focus_x": 0.9, "focus_y": 0.5}]
    zoom = {"focus_x": 0.9, "focus_y": 0.5, "focus_width": 0.3, "focus_height": 0.9}
    for number, columns in enumerate([*focus, zoom]):
        rows[0] = {"file_name": "0.png", "text": "x", **columns}
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert encoded(folder, tmp_path / "cache", square)[0] == (1 if number else 4), columns


def test_captions_are_encoded_anew_in_another_number_format(document, tmp_path):
    """Fault 46. Embeddings of bf16 weights are not those of fp32; the autoencoder computes in fp32 in both."""
    del document["text_encoder_adapter"]
    cache = tmp_path / "cache"
    document["data"] = document["data"] | {"cache_folder": str(cache)}
    document["train"] = document["train"] | {"steps": 1}
    shards = []
    for dtype in ("fp32", "bf16", "bf16"):
        model = document["model"] | {"dtype": dtype}
        train(make_run(document | {"model": model, "output_dir": str(tmp_path / f"run{len(shards)}")}))
        shards.append({name: len(list((cache / name).glob("shard-*"))) for name in ("latents", "text")})
    assert shards[1]["text"] == shards[2]["text"] > shards[0]["text"]
    assert shards[0]["latents"] == shards[2]["latents"]
