"""Stable Diffusion 3 and 3.5: MMDiT, rectified flow, two CLIP text encoders and, if there is one, T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.families import patterns, reading
from finetune.families.base import Conditioning, ModelFamily, SizeConditioning
from finetune.families.original_keys import LDM_VAE, MMDIT, plain, unprojected

_ENDS = r"norm1(_context)?\.linear|norm_out\.linear|proj_out|context_embedder|pos_embed\.proj"


class SD3(ModelFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large."""

    name = "sd3"
    denoiser = "transformer"
    pipeline_class = "StableDiffusion3Pipeline"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_text_encoders = frozenset({"text_encoder_3"})
    resolution = 1024
    bucket_multiple = 64
    modelspec_architecture = "stable-diffusion-v3-medium"
    kohya_base_version = "sd3"
    kohya_prefixes = {  # noqa: RUF012
        "denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
    }  # fmt: skip
    target_presets = patterns.presets(
        (
            rf".*\.({patterns.JOINT_ATTENTION})",
            rf".*\.({patterns.JOINT_ATTENTION}|{patterns.JOINT_MLP})",
            rf"(.*\.)?({patterns.JOINT_ATTENTION}|{patterns.JOINT_MLP}|{_ENDS})",
        ),
        text_encoder=patterns.CLIP,
        text_encoder_2=patterns.CLIP,
        text_encoder_3=patterns.T5,
    )
    # The last block drops its text half, so what that half asks for is never read.
    denoiser_unread = r"transformer_blocks\.{last}\.attn\.(add_q_proj|norm_added_q)"
    clip_layer = 2
    pooled_encoders = frozenset({"text_encoder", "text_encoder_2"})
    t5_tokens = {"text_encoder_3": 256}  # noqa: RUF012
    reading_options = frozenset({"clip_skip", "prompt_chunks", "t5_tokens"})
    skeletons = ("sd3-medium", "sd3.5-medium", "sd3.5-large")
    original = {  # noqa: RUF012
        "transformer": MMDIT,
        "vae": LDM_VAE,
        "text_encoder": unprojected("text_encoders.clip_l.transformer."),
        "text_encoder_2": plain("text_encoders.clip_g.transformer."),
        "text_encoder_3": plain("text_encoders.t5xxl.transformer."),
    }
    pipeline_prompts = {  # noqa: RUF012
        "encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds",
    }  # fmt: skip

    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """An SD3 text-to-image pipeline."""
        return (
            model_index.get("_class_name") == self.pipeline_class
            and denoiser_config.get("_class_name") == "SD3Transformer2DModel"
            and denoiser_config.get("in_channels") == denoiser_config.get("out_channels")
        )

    def encode_prompts(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> Conditioning:
        """Both CLIPs side by side, filled up with zeros to T5's width, then T5's own tokens behind them.

        Without T5 its tokens are zeros. Source: Esser et al. 2024, arXiv:2403.03206, section 4.
        """
        found = [
            reading.clip_hidden(text_encoders[name], tokens[name], self.hidden_layer(), normed=False)
            for name in self.text_encoders[:2]
        ]
        clip = torch.cat([states for states, _ in found], dim=-1)
        t5 = self._t5(text_encoders, tokens, clip)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([clip, t5], dim=1),
            "pooled_projections": torch.cat([pooled for _, pooled in found], dim=-1),
        }

    def _t5(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor], like: Tensor) -> Tensor:
        name = self.text_encoders[2]
        if name in text_encoders:
            return cast(Tensor, text_encoders[name](tokens[name])[0]).to(like.dtype)
        assert self.reading.width is not None, "loading tells the width of the encoder that is not there"
        return like.new_zeros(like.shape[0], self.token_limit(name, None), self.reading.width)

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning,
    ) -> Tensor:
        """See `ModelFamily.predict`; timesteps run from 0 to 1000 and need not be whole."""
        return cast(Tensor, denoiser(noisy_latents, timestep=timesteps, **conditioning).sample)

    def latent_multiple(self, denoiser: nn.Module) -> int:
        """One token stands for a square of latents."""
        config: Any = denoiser.config
        return int(config.patch_size)

    def notes(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> list[str]:
        """Nothing in an SD3 checkpoint tells whether it was distilled."""
        return []
