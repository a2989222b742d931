"""A tiny Stable Diffusion 1.x pipeline with random weights: real classes, real topology, built in a second.

For whatever needs a base model but no skill: shapes, names, gradients, files. What must learn uses the
embedded demo base.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.adapters.files import DOWN, UP, AdapterFile, AdapterHeader
from finetune.families.base import Components, ModelFamily
from finetune.families.text import canonical

RESOLUTION = 64
"""The side of a picture the tiny pipeline makes, in pixels; its latents are an eighth of it."""
LAST_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
MERGES = [("k", "s</w>"), ("s", "ks</w>"), ("t", "o"), ("to", "y</w>"), ("c", "at</w>"), ("a", "t</w>")]


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write the pipeline as a diffusers folder; the same weights every time.

    Args:
        folder: where to; made if it is missing.
        prediction_type: "epsilon" or "v_prediction", as the checkpoint's scheduler says.

    Returns:
        `folder`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_unet() -> UNet2DConditionModel:
    """Two levels, attention in the lower, the middle and the upper blocks; 0.6 million weights."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    )


def tiny_vae() -> AutoencoderKL:
    """Four levels, as the real one: a picture shrinks eightfold into four channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )


def tiny_text_encoder() -> CLIPTextModel:
    """Two CLIP layers of width 32 that read 77 tokens."""
    tokenizer = tiny_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """Reads any lower-case ASCII text, mostly letter by letter; "sks", "toy" and "cat" are one token each."""
    pieces = list(LAST_CHARACTERS) + [f"{character}</w>" for character in LAST_CHARACTERS]
    pieces += ["".join(pair) for pair in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=77)


def random_adapter(
    family: ModelFamily,
    components: Components,
    *,
    rank: Mapping[str, int],
    alpha: Mapping[str, float],
    preset: str = "all",
    strength: float = 0.05,
) -> AdapterFile:
    """A LoRA whose two factors are both noise, so that it changes the model a lot and any error shows.

    Args:
        rank: pipeline name of a network -> width; networks left out are not changed.
        alpha: the same names -> strength.
        preset: name in `family.target_presets`.
        strength: standard deviation of lora_B.
    """
    noise = torch.Generator().manual_seed(3)
    tensors = {}
    for component, width in rank.items():
        is_denoiser = component == family.denoiser
        network = components.denoiser if is_denoiser else components.text_encoders[component]
        pattern = family.target_presets[preset]["denoiser" if is_denoiser else component]
        for name, layer in network.named_modules():
            if re.fullmatch(pattern, name):
                key = f"{component}.{canonical(network, component, name)}"
                out, *inner = layer.weight.shape
                ones = [1] * (len(inner) - 1)
                tensors[key + DOWN] = torch.randn(width, *inner, generator=noise) * 0.1
                tensors[key + UP] = torch.randn(out, width, *ones, generator=noise) * strength
    header = AdapterHeader(
        family=family.name,
        base=components.source,
        base_digest=components.digest,
        method="lora",
        rank=dict(rank),
        alpha=dict(alpha),
        trigger_words=("sks toy",),
        run_digest="ab" * 32,
        step=100,
    )
    return AdapterFile(tensors, header)
