"""Flux.1: a transformer over packed latents, rectified flow, CLIP for the pooled text and T5 for the words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.families import patterns, reading
from finetune.families.base import Conditioning, ModelFamily, SizeConditioning
from finetune.families.notes import FEW_STEPS
from finetune.families.original_keys import FLUX, LDM_VAE, plain

SIDE = 2
"""One token stands for a square of 2 x 2 latents."""


class Flux(ModelFamily):
    """Flux.1 dev and schnell."""

    name = "flux"
    denoiser = "transformer"
    pipeline_class = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    resolution = 1024
    bucket_multiple = 64
    modelspec_architecture = "flux-1-dev"
    kohya_base_version = "flux1"
    kohya_prefixes = {  # noqa: RUF012
        "denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3",
    }  # fmt: skip
    target_presets = patterns.presets(
        (
            rf".*\.({patterns.JOINT_ATTENTION})",
            rf".*\.({patterns.JOINT_ATTENTION}|{patterns.JOINT_MLP}|proj_mlp)|single_transformer_blocks\.\d+\.proj_out",
            rf"(.*\.)?({patterns.JOINT_ATTENTION}|{patterns.JOINT_MLP}|proj_mlp|proj_out|norm1(_context)?\.linear"
            r"|norm\.linear|norm_out\.linear|context_embedder|x_embedder)",
        ),
        text_encoder=patterns.CLIP,
        text_encoder_2=patterns.T5,
    )
    pooled_encoders = frozenset({"text_encoder"})
    t5_tokens = {"text_encoder_2": 512}  # noqa: RUF012
    reading_options = frozenset({"t5_tokens", "guidance"})
    usual_guidance = 3.5
    distilled_guidance = True
    skeletons = ("flux-dev", "flux-schnell")
    original = {  # noqa: RUF012
        "transformer": FLUX,
        "vae": LDM_VAE,
        "text_encoder": plain("text_encoders.clip_l.transformer."),
        "text_encoder_2": plain("text_encoders.t5xxl.transformer."),
    }
    pipeline_prompts = {  # noqa: RUF012
        "encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds",
    }  # fmt: skip
    hands_sigmas = True
    packing = SIDE

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """A Flux.1 text-to-image pipeline; Fill, Depth and Canny read more channels."""
        return (
            model_index.get("_class_name") == self.pipeline_class
            and denoiser_config.get("_class_name") == "FluxTransformer2DModel"
            and denoiser_config.get("out_channels") in (None, denoiser_config.get("in_channels"))
        )

    def modelspec(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> str:
        """Schnell is the one that is told no guidance."""
        return self.modelspec_architecture if denoiser_config.get("guidance_embeds") else "flux-1-schnell"

    def encode_prompts(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> Conditioning:
        """T5's hidden states, shape (B, length, 4096), and CLIP's last state at the end mark, shape (B, 768)."""
        clip, t5 = self.text_encoders
        _, pooled = reading.clip_hidden(text_encoders[clip], tokens[clip], 1, normed=True)
        hidden = text_encoders[t5](tokens[t5])[0]
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning,
    ) -> Tensor:
        """See `ModelFamily.predict`; timesteps run from 0 to 1000, the transformer wants 0 to 1."""
        batch, _, height, width = noisy_latents.shape
        device = noisy_latents.device
        config: Any = denoiser.config
        told = torch.full((batch,), self.reading.guidance, device=device) if config.guidance_embeds else None
        packed = denoiser(
            hidden_states=reading.pack(noisy_latents, SIDE),
            timestep=timesteps.float() / 1000,
            guidance=told,
            img_ids=_places(height // SIDE, width // SIDE, device),
            txt_ids=torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=device),
            **conditioning,
        ).sample
        return reading.unpack(cast(Tensor, packed), height, width, SIDE)

    def latent_multiple(self, denoiser: nn.Module) -> int:
        """One token stands for a square of latents."""
        return SIDE

    def notes(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> list[str]:
        """Schnell is the one that is told no guidance."""
        if denoiser_config.get("guidance_embeds"):
            return []
        return [FEW_STEPS.format(sign="it is told no guidance strength, as Flux.1 schnell")]


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of every image token, shape (height * width, 3)."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
