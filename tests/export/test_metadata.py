"""A file says what it is, with hashes of its own bytes, and nothing about who made it where."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from finetune import storage
from finetune.export import metadata, privacy
from finetune.export.errors import ExportError
from finetune.export.exporting import export
from finetune.export.job import ModelInfo
from finetune.storage import read_safetensors

INFO = ModelInfo(
    title="Sks toy",
    description="A toy, taught to SD 1.5",
    author="someone",
    license="cc-by-4.0",
    resolution=512,
    images=12,
    learning_rate=1e-4,
    optimizer="adamw",
    seed=7,
)


def exported(base, adapter, folder, **options) -> tuple[dict[str, str], dict[str, str]]:
    """Metadata of the kohya and of the diffusers file."""
    export(adapter, *base, folder, name="toy", info=INFO, **options)
    return tuple(
        read_safetensors(folder / f"{name}.safetensors")[1] for name in ("toy", "pytorch_lora_weights")
    )


def test_modelspec(base, adapter, tmp_path):
    for entries in exported(base, adapter, tmp_path):
        assert entries["modelspec.sai_model_spec"] == "1.0.1"
        assert entries["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert entries["modelspec.implementation"] == "diffusers"
        assert entries["modelspec.title"] == "Sks toy"
        assert entries["modelspec.resolution"] == "512x512"
        assert entries["modelspec.prediction_type"] == "epsilon"
        assert entries["modelspec.trigger_phrase"] == "sks toy"


def test_kohya_entries(base, adapter, tmp_path):
    """A1111, InvokeAI and ComfyUI managers show these."""
    entries, _ = exported(base, adapter, tmp_path)
    assert entries["ss_base_model_version"] == "sd_v1"
    assert entries["ss_v2"] == "False"
    assert entries["ss_network_module"] == "networks.lora"
    assert entries["ss_network_dim"] == entries["ss_network_alpha"] == "8"
    assert entries["ss_output_name"] == "toy"
    assert json.loads(entries["ss_tag_frequency"]) == {"training": {"sks toy": 12}}
    assert json.loads(entries["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "sks toy"


def test_hashes_are_of_the_bytes_written(base, adapter, tmp_path):
    """Thousands of published files carry a wrong hash, and pictures made with them never find their model."""
    for entries, name in zip(exported(base, adapter, tmp_path), ("toy", "pytorch_lora_weights"), strict=True):
        data = (tmp_path / f"{name}.safetensors").read_bytes()
        region = data[8 + int.from_bytes(data[:8], "little") :]
        assert entries["sshs_model_hash"] == hashlib.sha256(region).hexdigest()
        assert entries["modelspec.hash_sha256"] == f"0x{entries['sshs_model_hash']}"
        assert "sshs_legacy_hash" not in entries, "the stretch at 1 MiB is empty in this small file"


@pytest.mark.parametrize("size", [300_000, 262_144 + 10, 600_000])
def test_legacy_hash_covers_the_stretch_at_one_mebibyte(tmp_path, size):
    tensors = {"a": torch.rand(size), "b": torch.rand(9).half()}
    path = tmp_path / "a.safetensors"
    storage.write_safetensors(path, tensors, metadata.with_hashes(tensors, {"format": "pt"}))
    _, entries = read_safetensors(path)
    stretch = path.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert entries["sshs_legacy_hash"] == hashlib.sha256(stretch).hexdigest()[:8]


def test_source_date_epoch_decides(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    entries, _ = exported(base, adapter, tmp_path)
    assert entries["modelspec.date"] == "1970-01-02T00:00:00Z"


def test_no_path_user_or_host_in_any_file(base, adapter, tmp_path):
    """The base lies in a folder called secret-folder-..., the output in tmp_path: neither may be told."""
    adapter.header = dataclasses.replace(adapter.header, base=str(tmp_path / "models" / "my-base"))
    export(adapter, *base, tmp_path, name="toy", formats=["diffusers", "kohya", "peft", "merged"])
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert file.name != "toy.safetensors" or b'"finetune.base":"my-base"' in file.read_bytes()
            data = file.read_bytes()
            assert b"secret-folder" not in data, file
            assert str(tmp_path).encode() not in data, file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("see /home/jane/pictures/cat", "the path /home/jane/pictures/cat"),
        (r"C:\Users\jane", "the path"),
        ("token hf_" + "a" * 30, "a hub token"),
        (f"in {Path.home()}/runs", "the home folder"),
        ("canary-value-123", "FINETUNE_TEST_TOKEN"),
    ],
)
def test_private_text_is_refused(base, adapter, tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("FINETUNE_TEST_TOKEN", "canary-value-123")
    with pytest.raises(ExportError) as caught:
        export(adapter, *base, tmp_path, name="toy", info=ModelInfo(description=text))
    assert "modelspec.description holds" in caught.value.text()
    assert message in caught.value.text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["https://huggingface.co/a/b", "and/or", "50/50, 3/4", "a/b", "time 10:20", "sd 1.5"]
)
def test_harmless_text_is_kept(text):
    assert privacy.private_parts(text) == []


@pytest.mark.parametrize(
    ("base_name", "public"),
    [
        ("owner/model", "owner/model"),
        ("demo", "demo"),
        ("/home/jane/models/sd15", "sd15"),
        ("~/sd15", "sd15"),
        ("../models/sd15", "sd15"),
        (r"C:\models\sd15", "sd15"),
    ],
)
def test_public_name(base_name, public):
    assert privacy.public_name(base_name) == public
