"""Stable Diffusion 1 and 2: UNet, one text encoder, 4-channel latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from finetune.families import patterns, reading
from finetune.families.base import Conditioning, SizeConditioning
from finetune.families.original_keys import LDM_VAE, UNET, open_clip, plain
from finetune.families.unet import UNetFamily

OPEN_CLIP_WIDTH = 1024
"""What SD2's denoiser reads per token: the width of OpenCLIP ViT-H."""


class SDFamily(UNetFamily):
    """What SD1 and SD2 share: all but the text encoder."""

    pipeline_class = "StableDiffusionPipeline"
    inpainting_class = "StableDiffusionInpaintPipeline"
    text_encoders = ("text_encoder",)
    resolution = 512
    kohya_prefixes = {"denoiser": "lora_unet", "text_encoder": "lora_te"}  # noqa: RUF012
    target_presets = patterns.presets(patterns.UNET, text_encoder=patterns.CLIP)
    pipeline_prompts = {"encoder_hidden_states": "prompt_embeds"}  # noqa: RUF012

    def encode_prompts(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> Conditioning:
        """Hidden states after the final layer norm, shape (B, length, width)."""
        hidden, _ = reading.clip_hidden(
            text_encoders["text_encoder"], tokens["text_encoder"], self.hidden_layer(), normed=True
        )
        return {"encoder_hidden_states": hidden}

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning,
    ) -> Tensor:
        """See `ModelFamily.predict`; the denoiser is not told the picture's size."""
        return cast(Tensor, denoiser(noisy_latents, timesteps, **conditioning).sample)


class SD1(SDFamily):
    """Stable Diffusion 1.4, 1.5 and everything fine-tuned from them, v-prediction included."""

    name = "sd1"
    modelspec_architecture = "stable-diffusion-v1"
    kohya_base_version = "sd_v1"
    skeletons = ("sd1",)
    original = {  # noqa: RUF012
        "unet": UNET, "vae": LDM_VAE, "text_encoder": plain("cond_stage_model.transformer."),
    }  # fmt: skip

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """A pipeline whose UNet does not read OpenCLIP's 1024-wide text."""
        return self.is_ours(model_index, denoiser_config) and not _reads_open_clip(denoiser_config)


class SD2(SDFamily):
    """Stable Diffusion 2.0 and 2.1, 512 px (epsilon) and 768 px (v-prediction).

    The text encoder is OpenCLIP ViT-H without its last layer: its last hidden layer is the original's penultimate one.
    """

    name = "sd2"
    modelspec_architecture = "stable-diffusion-v2-512"
    kohya_base_version = "sd_v2"
    skeletons = ("sd2-base", "sd2-768")
    original = {  # noqa: RUF012
        "unet": UNET, "vae": LDM_VAE, "text_encoder": open_clip("cond_stage_model.model."),
    }  # fmt: skip

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """A pipeline whose UNet reads OpenCLIP's 1024-wide text."""
        return self.is_ours(model_index, denoiser_config) and _reads_open_clip(denoiser_config)

    def modelspec(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> str:
        """By what is predicted: kohya and ModelSpec name the v-prediction models by their 768 px."""
        predicts_v = scheduler_config.get("prediction_type") == "v_prediction"
        return "stable-diffusion-v2-768-v" if predicts_v else self.modelspec_architecture


def _reads_open_clip(denoiser_config: dict[str, Any]) -> bool:
    return denoiser_config.get("cross_attention_dim") == OPEN_CLIP_WIDTH
