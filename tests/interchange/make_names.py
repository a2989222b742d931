"""Write `finetune/interchange/names/*.json`: the layers of the published models, from their real configurations.

    python -m tests.interchange.make_names

Networks are built on the meta device, so nothing is downloaded and no memory is needed. The configurations below are
those of the models' own config.json files, as far as they decide names and shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

import finetune.interchange

FOLDER = Path(finetune.interchange.__file__).parent / "names"

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
UNET = {"sample_size": 64, "layers_per_block": 2, "in_channels": 4, "out_channels": 4}
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def clip(projection: bool, **config) -> nn.Module:
    made = transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **config)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(made)


def t5() -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **T5_XXL))


def sd_unet(**config) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280), down_block_types=(*[CROSS_DOWN] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *[CROSS_UP] * 3), **UNET, **config,
    )  # fmt: skip


def sdxl_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        **UNET,
    )  # fmt: skip


def refiner_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(384, 768, 1536, 1536),
        down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", CROSS_UP, CROSS_UP, "UpBlock2D"), transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24), cross_attention_dim=1280, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
        **UNET,
    )  # fmt: skip


def sd3(layers: int, heads: int, **config) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads,
        joint_attention_dim=4096, pooled_projection_dim=2048, in_channels=16, out_channels=16, **config,
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=4096,
        pooled_projection_dim=768, guidance_embeds=True, in_channels=64,
    )  # fmt: skip


def spelling(kohya: list[str], comfy: str, checkpoint: str, file_style: str = "same", style: str = "same") -> dict:
    """How readers spell a network: prefixes of keys, and the naming inside an original checkpoint."""
    return {"kohya": kohya, "comfy": comfy, "checkpoint": checkpoint, "checkpoint_style": file_style, "original": style}


UNET_SPELLING = spelling(["lora_unet"], "diffusion_model", "model.diffusion_model", "ldm", "ldm")
L_SD1 = spelling(["lora_te", "lora_te1"], "text_encoders.clip_l.transformer", "cond_stage_model.transformer")
H_SD2 = spelling(["lora_te", "lora_te1"], "text_encoders.clip_h.transformer", "cond_stage_model.model", "open_clip")
L_XL = spelling(["lora_te1", "lora_te"], "text_encoders.clip_l.transformer", "conditioner.embedders.0.transformer")
G_XL = spelling(["lora_te2"], "text_encoders.clip_g.transformer", "conditioner.embedders.1.model", "open_clip")
G_REFINER = spelling(["lora_te2"], "text_encoders.clip_g.transformer", "conditioner.embedders.0.model", "open_clip")
L_SD3 = spelling(["lora_te1"], "text_encoders.clip_l.transformer", "text_encoders.clip_l.transformer")
G_SD3 = spelling(["lora_te2"], "text_encoders.clip_g.transformer", "text_encoders.clip_g.transformer")
T5_SD3 = spelling(["lora_te3"], "text_encoders.t5xxl.transformer", "text_encoders.t5xxl.transformer")
T5_FLUX = spelling(["lora_te3", "lora_te2"], "text_encoders.t5xxl.transformer", "text_encoders.t5xxl.transformer")
MMDIT = spelling(["lora_unet", "lora_transformer"], "diffusion_model", "model.diffusion_model", "mmdit", "mmdit")
BFL = spelling(["lora_unet", "lora_transformer"], "diffusion_model", "", "bfl", "bfl")
SD3_TEXT = {
    "text_encoder": (lambda: clip(True, **CLIP_L), L_SD3),
    "text_encoder_2": (lambda: clip(True, **CLIP_G), G_SD3),
    "text_encoder_3": (t5, T5_SD3),
}

MODELS = {
    "sd1": (
        {"family": "sd1", "title": "Stable Diffusion 1.x", "denoiser": "unet", "kohya_names": "diffusers",
         "modelspec": ["stable-diffusion-v1"], "kohya_versions": ["sd_v1", "sd_1.5"], "serves": ["a1111", "invokeai"]},
        {"unet": (lambda: sd_unet(cross_attention_dim=768, attention_head_dim=8), UNET_SPELLING),
         "text_encoder": (lambda: clip(False, **CLIP_L), L_SD1)},
    ),
    "sd2": (
        {"family": "sd2", "title": "Stable Diffusion 2.x", "denoiser": "unet", "kohya_names": "diffusers",
         "modelspec": ["stable-diffusion-v2-512", "stable-diffusion-v2-768-v"], "kohya_versions": ["sd_v2", "sd_2.1"],
         "serves": ["a1111", "invokeai"]},
        {"unet": (lambda: sd_unet(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                                  use_linear_projection=True), UNET_SPELLING),
         "text_encoder": (lambda: clip(False, **CLIP_H), H_SD2)},
    ),
    "sdxl": (
        {"family": "sdxl", "title": "Stable Diffusion XL", "denoiser": "unet", "kohya_names": "original",
         "modelspec": ["stable-diffusion-xl-v1-base"], "kohya_versions": ["sdxl_base_v1-0", "sdxl_1.0"],
         "serves": ["a1111", "invokeai"]},
        {"unet": (sdxl_unet, UNET_SPELLING), "text_encoder": (lambda: clip(False, **CLIP_L), L_XL),
         "text_encoder_2": (lambda: clip(True, **CLIP_G), G_XL)},
    ),
    "sdxl-refiner": (
        {"family": "sdxl_refiner", "title": "Stable Diffusion XL refiner", "denoiser": "unet",
         "kohya_names": "original", "modelspec": ["stable-diffusion-xl-v1-refiner"],
         "kohya_versions": ["sdxl_refiner_v1-0"], "serves": []},
        {"unet": (refiner_unet, UNET_SPELLING), "text_encoder_2": (lambda: clip(True, **CLIP_G), G_REFINER)},
    ),
    "sd3-medium": (
        {"family": "sd3", "title": "Stable Diffusion 3 medium", "denoiser": "transformer", "kohya_names": "original",
         "modelspec": ["stable-diffusion-v3-medium", "stable-diffusion-3-medium"], "kohya_versions": ["sd3"],
         "serves": []},
        {"transformer": (lambda: sd3(24, 24, pos_embed_max_size=192), MMDIT), **SD3_TEXT},
    ),
    "sd3.5-medium": (
        {"family": "sd3", "title": "Stable Diffusion 3.5 medium", "denoiser": "transformer", "kohya_names": "original",
         "modelspec": ["stable-diffusion-3-5-medium"], "kohya_versions": ["sd3"], "serves": []},
        {"transformer": (lambda: sd3(24, 24, pos_embed_max_size=384, qk_norm="rms_norm",
                                     dual_attention_layers=tuple(range(13))), MMDIT), **SD3_TEXT},
    ),
    "sd3.5-large": (
        {"family": "sd3", "title": "Stable Diffusion 3.5 large", "denoiser": "transformer", "kohya_names": "original",
         "modelspec": ["stable-diffusion-3-5-large"], "kohya_versions": ["sd3"], "serves": []},
        {"transformer": (lambda: sd3(38, 38, pos_embed_max_size=192, qk_norm="rms_norm"), MMDIT), **SD3_TEXT},
    ),
    "flux1": (
        {"family": "flux", "title": "FLUX.1", "denoiser": "transformer", "kohya_names": "original",
         "modelspec": ["flux-1-dev", "flux-1-schnell"], "kohya_versions": ["flux1", "flux"], "serves": ["invokeai"]},
        {"transformer": (flux, BFL), "text_encoder": (lambda: clip(False, **CLIP_L), L_SD3),
         "text_encoder_2": (t5, T5_FLUX)},
    ),
}  # fmt: skip


def layers_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of the weight, of every layer whose output an adapter can change."""
    clip_flat = type(network).__name__ == "CLIPTextModel" and not hasattr(network, "text_model")
    found = {}
    for name, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and not isinstance(layer, nn.Embedding):
            found[f"text_model.{name}" if clip_flat else name] = tuple(weight.shape)
    return found


def folded(layers: dict[str, tuple[int, ...]]) -> dict:
    """Names as a tree; branches that are equal share one key, separated by spaces."""
    tree: dict = {}
    for name, shape in layers.items():
        node = tree
        *stem, leaf = name.split(".")
        for part in stem:
            node = node.setdefault(part, {})
        node.setdefault(leaf, {})[""] = list(shape)
    return _shared(tree)


def _shared(tree: dict) -> dict:
    merged: dict[str, list[str]] = {}
    values = {}
    for key, value in tree.items():
        done = value if key == "" else _shared(value)
        text = json.dumps(done, sort_keys=True) if key else "the layer itself"
        merged.setdefault(text, []).append(key)
        values[text] = done
    return {
        " ".join(keys): values[text][""] if set(values[text]) == {""} and keys != [""] else values[text]
        for text, keys in merged.items()
    }


def document(name: str) -> dict:
    facts, networks = MODELS[name]
    components = {}
    with torch.device("meta"):
        for component, (build, spelled) in networks.items():
            components[component] = {**spelled, "layers": folded(layers_of(build()))}
    return {**facts, "components": components}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        text = json.dumps(document(name), separators=(",", ":"), sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
