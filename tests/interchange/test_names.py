"""Tables of names: derived from the real configurations, and equal to what diffusers' own converters say."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.loaders import single_file_utils

from finetune.interchange import names
from finetune.interchange.original_names import STYLES
from tests.interchange import make_names
from tests.interchange.files import table

COUNTS = {"sd1": (282, 72, 192), "sdxl": (794, 72, 722)}
"""Table -> Linear and Conv2d layers of the UNet, of CLIP-L, and those that kohya trains without convolutions."""


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_tables_are_what_the_models_are_made_of(name):
    """A table that drifted from the configuration it was written from would misread files."""
    path = names.FOLDER / f"{name}.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(make_names.document(name)))


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_are_those_of_the_field(name):
    """The numbers of layers that other trainers report for these models."""
    unet, clip, attention = COUNTS[name]
    networks = table(name).networks
    matrices = {module: shape for module, shape in networks["unet"].layers.items() if len(shape) > 1}
    assert len(matrices) == unet
    assert sum(len(shape) > 1 for shape in networks["text_encoder"].layers.values()) == clip
    inside = [module for module in matrices if ".attentions." in module]
    assert len(inside) == attention


@pytest.mark.parametrize("architecture", names.published(), ids=lambda item: item.name)
def test_no_stem_means_two_layers(architecture):
    """Underscored names are looked up, so two layers of one spelling would be mistaken for each other."""
    assert len(names.spelled(architecture)) > 1000


def numbered(pieces_of: dict, shapes: dict) -> tuple[dict, dict]:
    """Tiny tensors in place of weights, every row with its own number; under original names, and under diffusers'."""
    rows = {}
    for name, shape in shapes.items():
        rows[name] = torch.arange(shape[0], dtype=torch.float64)[:, None] + 100_000 * (1 + len(rows))
    joined = {
        f"{name}.weight": torch.cat([rows[module][first:last] for module, first, last in parts])
        for name, parts in pieces_of.items()
    }
    return joined, {f"{name}.weight": value for name, value in rows.items()}


CONVERTERS = {
    "sd3-medium": ("mmdit", single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers, "pos_embed.pos_embed"),
    "sd3.5-medium": ("mmdit", single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers, "pos_embed.pos_embed"),
    "flux1": ("bfl", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, ""),
}

SCALES = ("norm.query_norm.scale", "norm.key_norm.scale")
NORMS = {
    ".attn.qkv.weight": (".attn.ln_q.weight", ".attn.ln_k.weight"),
    ".attn2.qkv.weight": (".attn2.ln_q.weight", ".attn2.ln_k.weight"),
    "_attn.qkv.weight": tuple(f"_attn.{scale}" for scale in SCALES),
    "linear1.weight": SCALES,
}


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_transformers_split_as_diffusers_splits_them(name):
    """A fused layer cut in the wrong place loads everywhere and draws noise."""
    style, convert, extra = CONVERTERS[name]
    layers = {module: shape for module, shape in table(name).networks["transformer"].layers.items() if len(shape) > 1}
    original, expected = numbered(STYLES[style](layers), layers)
    checkpoint = {key: value.clone() for key, value in original.items()}
    for key in list(checkpoint):
        checkpoint[key.removesuffix("weight") + "bias"] = checkpoint[key][:, 0].clone()
    # The converters ask for the norms beside q, k and v, which no adapter changes.
    for key in list(checkpoint):
        for leaf, beside in NORMS.items():
            if key.endswith(leaf):
                checkpoint |= {key.removesuffix(leaf) + norm: torch.zeros(1) for norm in beside}
    if extra:
        checkpoint["pos_embed"] = torch.zeros(1)
    converted = convert(checkpoint)
    for key, value in expected.items():
        assert torch.equal(converted[key], value), key


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_unets_are_named_as_diffusers_names_them(name):
    """The original names decide which layers ComfyUI, A1111 and kohya's SDXL files mean."""
    layers = dict(table(name).networks["unet"].layers)
    original, expected = numbered(STYLES["ldm"](layers), layers)
    config = {
        "layers_per_block": 2, "class_embed_type": None, "addition_embed_type": "text_time" if name == "sdxl" else None,
        "down_block_types": [0] * (3 if name == "sdxl" else 4), "up_block_types": [0] * (3 if name == "sdxl" else 4),
        "block_out_channels": [0] * (3 if name == "sdxl" else 4),
    }  # fmt: skip
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in original.items()}
    for key, value in list(checkpoint.items()):
        checkpoint[key.removesuffix("weight") + "bias"] = value[:, 0]
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    wrong = [key for key, value in expected.items() if key not in converted or not torch.equal(converted[key], value)]
    assert not wrong


def test_a_base_of_any_size_brings_its_own_names(tiny_base):
    """Adapters of small or unusual bases are read by the names in their own files."""
    architecture = names.from_base(tiny_base)
    spelled = names.spelled(architecture)
    assert architecture.family == "sd1"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert spelled[stem].pieces[0].stop == 32
    assert "lora_te_text_model_encoder_layers_1_mlp_fc2" in spelled
