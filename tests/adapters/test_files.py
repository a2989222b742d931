"""An adapter file keeps its names, numbers and origin, and is refused when it contradicts itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from finetune import storage
from finetune.adapters.files import HEADER_KEY, AdapterFile, AdapterHeader, delta_weight
from finetune.errors import CheckpointError

HEADER = AdapterHeader(
    family="sd1",
    base="demo",
    base_digest="cd" * 32,
    method={"unet": "lora", "text_encoder": "lora"},
    rank={"unet": 2, "text_encoder": 3},
    alpha={"unet": 1.0, "text_encoder": 6.0},
    trigger_words=("sks", "größer"),
    run_digest="ab" * 32,
    step=7,
)
CONV = "unet.down_blocks.0.resnets.0.conv1"
LINEAR = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def adapter() -> AdapterFile:
    return AdapterFile(
        {
            f"{CONV}.lora_A.weight": torch.randn(2, 4, 3, 3),
            f"{CONV}.lora_B.weight": torch.randn(8, 2, 1, 1),
            f"{LINEAR}.lora_A.weight": torch.randn(3, 4),
            f"{LINEAR}.lora_B.weight": torch.randn(5, 3),
        },
        HEADER,
    )


def test_round_trip_and_same_bytes(tmp_path):
    file = adapter()
    file.save(tmp_path / "a.safetensors")
    read = AdapterFile.read(tmp_path / "a.safetensors")
    read.save(tmp_path / "b.safetensors")
    assert read.header == HEADER
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_modules_and_scale():
    file = adapter()
    found = [(component, module) for component, module, *_ in file.modules()]
    assert found == [tuple(LINEAR.split(".", 1)), tuple(CONV.split(".", 1))]
    assert file.components() == ["text_encoder", "unet"]
    assert file.scale("unet") == 0.5
    assert file.scale("text_encoder") == 2.0


def test_delta_weight_is_what_two_layers_in_a_row_do():
    """A convolution's update must equal running the small convolution and then the 1x1 one."""
    down, up = torch.randn(2, 4, 3, 3), torch.randn(8, 2, 1, 1)
    picture = torch.randn(1, 4, 6, 6)
    in_a_row = nn.functional.conv2d(nn.functional.conv2d(picture, down, padding=1), up)
    torch.testing.assert_close(nn.functional.conv2d(picture, delta_weight(down, up), padding=1), in_a_row)
    assert delta_weight(torch.randn(3, 4), torch.randn(5, 3)).shape == (5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": {"unet": 9, "text_encoder": 3}}, "do not fit the header's rank 9"),
        ({"alpha": {"unet": 1e9, "text_encoder": 6.0}}, "not a usable scale"),
        ({"alpha": {"unet": float("nan"), "text_encoder": 6.0}}, "not a usable scale"),
        ({"rank": {"unet": 2}}, "no rank or no alpha for text_encoder"),
    ],
)
def test_header_that_lies_is_refused(tmp_path, change, message):
    """Metadata is checked against shapes: a wrong alpha makes a thousandfold stronger model."""
    file = adapter()
    file.header = dataclasses.replace(HEADER, **change)
    file.save(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        AdapterFile.read(tmp_path / "a.safetensors")


def test_missing_counterpart_and_odd_names_are_listed():
    file = adapter()
    del file.tensors[f"{CONV}.lora_B.weight"]
    file.tensors["bundle_emb.sks"] = torch.zeros(1)
    problems = "\n".join(file.problems())
    assert f"{CONV} lacks lora_B.weight" in problems
    assert "bundle_emb.sks is not named" in problems


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "not an adapter written by this toolkit"),
        ({HEADER_KEY: "{"}, "unreadable header"),
        ({HEADER_KEY: json.dumps({"version": 99})}, "version 99"),
        ({HEADER_KEY: json.dumps({"version": 1})}, "unreadable header"),
        ({HEADER_KEY: "[1]"}, "unreadable header"),
    ],
)
def test_foreign_files_are_refused(tmp_path, metadata, message):
    storage.write_safetensors(tmp_path / "a.safetensors", adapter().tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        AdapterFile.read(tmp_path / "a.safetensors")
