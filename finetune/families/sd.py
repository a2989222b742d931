"""Stable Diffusion 1.x: UNet, one CLIP text encoder, 4-channel latents."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from finetune.families.base import Conditioning, Latents, ModelFamily, SizeConditioning

_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_MLP = r"ff\.net\.(0\.proj|2)|proj_in|proj_out"
_CONV = r"conv1|conv2|conv_shortcut|time_emb_proj|(down|up)samplers\.0\.conv"


class SD1(ModelFamily):
    """Stable Diffusion 1.4, 1.5 and everything fine-tuned from them."""

    name = "sd1"
    denoiser = "unet"
    pipeline_class = "StableDiffusionPipeline"
    text_encoders = ("text_encoder",)
    resolution = 512
    bucket_multiple = 64
    modelspec_architecture = "stable-diffusion-v1"
    kohya_base_version = "sd_v1"
    kohya_prefixes = {"denoiser": "lora_unet", "text_encoder": "lora_te"}  # noqa: RUF012
    target_presets = {  # noqa: RUF012
        "attention": {
            "denoiser": rf".*\.({_ATTENTION})",
            "text_encoder": r".*\.self_attn\.(q|k|v|out)_proj",
        },
        "attention+mlp": {
            "denoiser": rf".*\.({_ATTENTION}|{_MLP})",
            "text_encoder": r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
        },
        "all": {
            "denoiser": rf".*\.({_ATTENTION}|{_MLP}|{_CONV})",
            "text_encoder": r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
        },
    }

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """A plain text-to-image pipeline with a four-input UNet that does not read OpenCLIP's 1024-wide text (SD2)."""
        return (
            model_index.get("_class_name") == self.pipeline_class
            and denoiser_config.get("_class_name") == "UNet2DConditionModel"
            and denoiser_config.get("in_channels") == denoiser_config.get("out_channels")
            and denoiser_config.get("cross_attention_dim") != 1024
        )

    def encode_images(self, vae: nn.Module, pixel_values: Tensor) -> Latents:
        """See `ModelFamily.encode_images`."""
        posterior = cast(Any, vae).encode(pixel_values).latent_dist
        scale = cast(Any, vae).config.scaling_factor
        return Latents(mean=posterior.mean * scale, std=posterior.std * scale)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See `ModelFamily.decode_latents`."""
        decoder = cast(Any, vae)
        return cast(Tensor, decoder.decode(latents / decoder.config.scaling_factor).sample)

    def encode_prompts(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> Conditioning:
        """The last hidden states after the final layer norm, shape (B, length, width)."""
        hidden = text_encoders["text_encoder"](tokens["text_encoder"]).last_hidden_state
        return {"encoder_hidden_states": hidden}

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning,
    ) -> Tensor:
        """See `ModelFamily.predict`; SD1.x is not told the picture's size."""
        return cast(Tensor, denoiser(noisy_latents, timesteps, **conditioning).sample)
