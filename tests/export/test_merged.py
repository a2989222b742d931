"""A merged model is the base plus the adapter, rounded once; what rounding takes is said aloud or refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from finetune.adapters.files import TOKENS
from finetune.config import ModelConfig
from finetune.export.errors import ExportError
from finetune.export.exporting import export
from finetune.export.job import Job, ModelInfo
from finetune.export.merged import without_words
from finetune.families import denoiser_config, load_family
from finetune.interchange.inspection import inspect_file
from finetune.storage import read_safetensors
from tests.tiny import random_adapter


def weak(base):
    return random_adapter(*base, rank={"unet": 8}, alpha={"unet": 8.0}, preset="attention", strength=2e-3)


def test_half_precision_merge_of_a_weak_adapter_is_refused(base, tmp_path):
    """bf16 has 8 bits: adding a small change to a large weight often changes nothing."""
    with pytest.raises(ExportError, match=r"Merged in bf16, rounding would disturb") as caught:
        export(weak(base), *base, tmp_path, name="toy", formats=["merged"], dtype="bf16")
    assert "fp32" in caught.value.text()
    assert not list(tmp_path.iterdir())


def test_forced_merge_says_what_it_lost(base, tmp_path):
    losses = {}
    for dtype in ("fp32", "fp16", "bf16"):
        (done,) = export(
            weak(base), *base, tmp_path / dtype, name="toy", formats=["merged"], dtype=dtype, force=True
        )
        assert done.rounding.worst >= done.rounding.total
        losses[dtype] = done.rounding.total
    assert losses["fp32"] < 1e-3
    assert 0.01 < losses["fp16"] < losses["bf16"]


def test_rounding_of_the_base_alone_is_not_blamed_on_the_adapter(base, tmp_path):
    """A strong adapter on an fp32 base keeps its effect in fp16, though every weight is rounded."""
    strong = random_adapter(*base, rank={"unet": 8}, alpha={"unet": 8.0}, preset="attention", strength=0.5)
    (done,) = export(strong, *base, tmp_path, name="toy", formats=["merged"], dtype="fp16")
    assert done.rounding.total < 1e-3


def test_names_on_disk_are_canonical_and_both_spellings_load(base, adapter, tmp_path):
    """Every published checkpoint says `text_model.`; transformers from 5.6 on writes it without."""
    export(adapter, *base, tmp_path, name="toy", formats=["merged"])
    tensors, metadata = read_safetensors(tmp_path / "merged" / "text_encoder" / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert all(name.startswith("text_model.") for name in tensors)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    loaded.save_pretrained(tmp_path / "by diffusers")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "by diffusers")
    for name, tensor in loaded.text_encoder.state_dict().items():
        assert torch.equal(tensor, again.text_encoder.state_dict()[name])


def test_folder_is_complete_and_names_no_local_folder(base, adapter, tmp_path):
    """Libraries note where a model was loaded from; that is nobody else's business."""
    export(adapter, *base, tmp_path, name="toy", formats=["merged"], dtype="fp16", force=True)
    folder = tmp_path / "merged"
    texts = {file: file.read_text() for file in folder.rglob("*.json")}
    assert not any("secret-folder" in text or "_name_or_path" in text for text in texts.values())
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    assert (folder / "tokenizer" / "vocab.json").is_file(), "transformers 4 reads it"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float16
    assert pipeline.tokenizer.model_max_length == 77


def test_overflowing_weight_is_refused_by_name(base, adapter, tmp_path):
    adapter.tensors = {name: t * 1e4 if "attn1.to_q" in name else t for name, t in adapter.tensors.items()}
    with pytest.raises(ExportError, match=r"do not fit fp16.*\n.*to_q\.weight"):
        export(adapter, *base, tmp_path, name="toy", formats=["merged"], dtype="fp16", force=True)


def test_scheduler_with_infinite_settings_survives(base, adapter, tmp_path):
    """DPM-Solver's configuration holds -Infinity, which strict JSON has no word for."""
    family, components = base
    config = {**components.scheduler_config, "_class_name": "DPMSolverMultistepScheduler"}
    other = dataclasses.replace(components, scheduler_config=config)
    export(adapter, family, other, tmp_path, name="toy", formats=["merged"])
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(loaded.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert loaded.scheduler.config.beta_schedule == "scaled_linear"


def test_a_single_file_of_the_embedded_base_is_a_base_again(tmp_path):
    """Its size is nobody else's; its papers say where its shapes stand, so nothing has to be set to draw with it."""
    demo = load_family("demo")
    (done,) = export(weak(demo), *demo, tmp_path, name="toy", formats=["single-file"], force=True)
    family, parts = load_family(str(done.path))
    assert family.name == demo[0].name and parts.denoiser.config.in_channels == demo[1].denoiser.config.in_channels
    assert denoiser_config(ModelConfig(base=str(done.path)))["in_channels"] == parts.denoiser.config.in_channels
    assert "the file names Stable Diffusion 1.x" in inspect_file(done.path, norms=False).base


def test_a_table_of_tokens_that_was_trained_whole_is_no_learned_word(base):
    """Both are called token_embedding; a single file once lost the table of a fully trained text encoder."""
    file = random_adapter(*base, rank={"unet": 4}, alpha={"unet": 4.0})
    table = "text_encoder.text_model.embeddings.token_embedding.weight"
    word = f"text_encoder.{TOKENS}.0"
    header = dataclasses.replace(file.header, method={"text_encoder": "full"}, tokens=("<robot>",))
    both = dataclasses.replace(file, tensors={table: torch.zeros(8, 4), word: torch.zeros(2, 4)}, header=header)
    job = Job(both, *base, "toy", torch.float32, ModelInfo())
    assert set(without_words(job).file.tensors) == {table}
