"""Configurations of the tiny models: (pipeline, networks, scheduler, switches) of each family."""

from __future__ import annotations

from typing import Any

from finetune.families.twins.tokenizers import T5_LENGTH, clip_tokenizer, t5_tokenizer

Shape = tuple[str, dict[str, dict[str, Any]], dict[str, Any], dict[str, Any]]
PLAIN_DOWN, CROSS_DOWN, PLAIN_UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
WIDTH = 32
"""Width of the twins of CLIP ViT-L."""
WIDE = 48
"""Width of the twins of OpenCLIP bigG; readers tell both by their widths."""
T5_WIDTH = 128
SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
DDIM = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def sd1() -> Shape:
    """Two levels, attention in one of them, one text encoder of two layers."""
    return (
        "StableDiffusionPipeline",
        {"vae": _vae(), "text_encoder": _clip(), "unet": _unet(cross_attention_dim=WIDTH, attention_head_dim=4)},
        DDIM,
        SAFETY,
    )


def sd2() -> Shape:
    """As SD1, but projections are linear, and the text is as wide as OpenCLIP ViT-H's, by which SD2 is known."""
    wide = _clip(hidden_size=1024, intermediate_size=64, hidden_act="gelu")
    unet = _unet(cross_attention_dim=1024, attention_head_dim=[4, 8], use_linear_projection=True)
    return "StableDiffusionPipeline", {"vae": _vae(), "text_encoder": wide, "unet": unet}, DDIM, SAFETY


def sdxl() -> Shape:
    """Two text encoders, the second with a projection; the UNet is told sizes."""
    unet = _xl_unet(cross_attention_dim=WIDTH + WIDE, told=6 * 8 + WIDE)
    parts = {
        "vae": _vae(),
        "text_encoder": _clip(),
        "text_encoder_2": _big_clip(),
        "unet": unet,
    }
    return "StableDiffusionXLPipeline", parts, DDIM, {"force_zeros_for_empty_prompt": True, "add_watermarker": False}


def sdxl_refiner() -> Shape:
    """The second text encoder alone; the UNet is told an aesthetic score."""
    parts = {
        "vae": _vae(),
        "text_encoder_2": _big_clip(),
        "unet": _xl_unet(cross_attention_dim=WIDE, told=5 * 8 + WIDE),
    }
    missing = {"text_encoder": None, "tokenizer": None}
    switches = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False, "add_watermarker": False}
    return "StableDiffusionXLImg2ImgPipeline", parts, DDIM, switches | missing


def sd3() -> Shape:
    """Two blocks; three text encoders; 16-channel latents with a shift."""
    transformer = {
        "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": 64, "pooled_projection_dim": WIDTH + WIDE, "pos_embed_max_size": 32,
        "qk_norm": "rms_norm", "dual_attention_layers": [0],
    }  # fmt: skip
    parts = {
        "vae": _wide_vae(), "text_encoder": _clip(kind="CLIPTextModelWithProjection"), "text_encoder_2": _big_clip(),
        "text_encoder_3": _t5(), "transformer": transformer,
    }  # fmt: skip
    return "StableDiffusion3Pipeline", parts, FLOW, {}


def flux() -> Shape:
    """One block of each kind; CLIP for the pooled text, T5 for the words; told a guidance strength."""
    transformer = {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": WIDTH, "guidance_embeds": True, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    parts = {"vae": _wide_vae(), "text_encoder": _clip(), "text_encoder_2": _t5(), "transformer": transformer}
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return "FluxPipeline", parts, FLOW | dynamic, {}


def _unet(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1,
        "down_block_types": [CROSS_DOWN, PLAIN_DOWN], "up_block_types": [PLAIN_UP, CROSS_UP], "norm_num_groups": 8,
        **changes,
    }  # fmt: skip


def _xl_unet(*, cross_attention_dim: int, told: int) -> dict[str, Any]:
    return _unet(
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=[4, 8],
        use_linear_projection=True,
        down_block_types=[PLAIN_DOWN, CROSS_DOWN],
        up_block_types=[CROSS_UP, PLAIN_UP],
        transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=told,
    )


def _vae(**changes: Any) -> dict[str, Any]:
    """Four levels, as the real one: a picture shrinks eightfold."""
    return {
        "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64, **changes,
    }  # fmt: skip


def _wide_vae() -> dict[str, Any]:
    return _vae(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )


def _clip(kind: str = "CLIPTextModel", **changes: Any) -> dict[str, Any]:
    """Two layers of width 32 that read 77 tokens."""
    tokenizer = clip_tokenizer()
    return {
        "architectures": [kind], "model_type": "clip_text_model", "vocab_size": len(tokenizer), "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": WIDTH,
        "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **changes,
    }  # fmt: skip


def _big_clip() -> dict[str, Any]:
    return _clip(
        kind="CLIPTextModelWithProjection", hidden_act="gelu", hidden_size=WIDE, intermediate_size=2 * WIDE,
        projection_dim=WIDE,
    )  # fmt: skip


def _t5() -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": len(t5_tokenizer()), "d_model": T5_WIDTH,
        "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "feed_forward_proj": "gated-gelu",
        "n_positions": T5_LENGTH, "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
