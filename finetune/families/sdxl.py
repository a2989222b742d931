"""Stable Diffusion XL: UNet, two text encoders, told how the picture was cut; and its refiner with one text encoder."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.families import patterns, reading
from finetune.families.base import Conditioning, SizeConditioning
from finetune.families.original_keys import LDM_VAE, UNET, open_clip, plain
from finetune.families.unet import UNetFamily

AESTHETIC_SCORE = 6.0
"""What the refiner is told of a picture to be drawn; diffusers' default, on a scale of 1 to 10."""


class XLFamily(UNetFamily):
    """What SDXL and its refiner share."""

    resolution = 1024
    clip_layer = 2
    pooled_encoders = frozenset({"text_encoder_2"})
    pipeline_prompts = {  # noqa: RUF012
        "encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds",
    }  # fmt: skip

    def encode_prompts(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> Conditioning:
        """The second-last hidden states of all encoders side by side, and the last encoder's pooled output.

        An empty prompt is all zeros where the checkpoint says so (`force_zeros_for_empty_prompt`), because that is what
        guidance subtracts when sampling.
        """
        hidden, pooled = [], torch.empty(0)
        for name in self.text_encoders:
            states, pooled = reading.clip_hidden(
                text_encoders[name], tokens[name], self.hidden_layer(), normed=False
            )
            hidden.append(states)
        states = torch.cat(hidden, dim=-1)
        if self.reading.zero_empty:
            last = self.text_encoders[-1]
            kept = ~reading.is_empty(text_encoders[last], tokens[last])
            states, pooled = states * kept[:, None, None], pooled * kept[:, None]
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning,
    ) -> Tensor:
        """See `ModelFamily.predict`."""
        told = {"text_embeds": conditioning["text_embeds"], "time_ids": self.time_ids(sizes)}
        hidden = conditioning["encoder_hidden_states"]
        return cast(
            Tensor,
            denoiser(noisy_latents, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=told).sample,
        )

    def time_ids(self, sizes: SizeConditioning) -> Tensor:
        """What the denoiser is told of the cut, shape (B, numbers), fp32.

        Source: Podell et al. 2023, SDXL, arXiv:2307.01952, sections 2.2 and 2.3.
        """
        return torch.cat(self._told(sizes), dim=1).float()

    @abstractmethod
    def _told(self, sizes: SizeConditioning) -> list[Tensor]:
        """The numbers that make up `time_ids`, each of shape (B, n)."""


class SDXL(XLFamily):
    """Stable Diffusion XL 1.0 and everything fine-tuned from it, v-prediction with zero terminal SNR included."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    inpainting_class = "StableDiffusionXLInpaintPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    modelspec_architecture = "stable-diffusion-xl-v1-base"
    kohya_base_version = "sdxl_base_v1-0"
    kohya_prefixes = {  # noqa: RUF012
        "denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2",
    }  # fmt: skip
    target_presets = patterns.presets(patterns.UNET, text_encoder=patterns.CLIP, text_encoder_2=patterns.CLIP)
    skeletons = ("sdxl",)
    original = {  # noqa: RUF012
        "unet": UNET,
        "vae": LDM_VAE,
        "text_encoder": plain("conditioner.embedders.0.transformer."),
        "text_encoder_2": open_clip("conditioner.embedders.1.model."),
    }

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """An SDXL pipeline that is told no aesthetic score."""
        return self.is_ours(model_index, denoiser_config) and not model_index.get("requires_aesthetics_score")

    def _told(self, sizes: SizeConditioning) -> list[Tensor]:
        return [sizes.original_size, sizes.crop_top_left, sizes.target_size]


class SDXLRefiner(XLFamily):
    """The SDXL refiner: OpenCLIP bigG alone, told an aesthetic score in place of the target size."""

    name = "sdxl_refiner"
    pipeline_class = "StableDiffusionXLImg2ImgPipeline"
    text_encoders = ("text_encoder_2",)
    modelspec_architecture = "stable-diffusion-xl-v1-refiner"
    kohya_base_version = "sdxl_refiner_v1-0"
    kohya_prefixes = {"denoiser": "lora_unet", "text_encoder_2": "lora_te2"}  # noqa: RUF012
    target_presets = patterns.presets(patterns.UNET, text_encoder_2=patterns.CLIP)
    skeletons = ("sdxl-refiner",)
    original = {  # noqa: RUF012
        "unet": UNET, "vae": LDM_VAE, "text_encoder_2": open_clip("conditioner.embedders.0.model."),
    }  # fmt: skip
    pipeline_starts_from_picture = True

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """An SDXL image-to-image pipeline that is told an aesthetic score."""
        return self.is_ours(model_index, denoiser_config) and bool(model_index.get("requires_aesthetics_score"))

    def _told(self, sizes: SizeConditioning) -> list[Tensor]:
        score = torch.full_like(sizes.original_size[:, :1], AESTHETIC_SCORE, dtype=torch.float32)
        return [sizes.original_size, sizes.crop_top_left, score]
