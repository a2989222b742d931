"""What all families share whose denoiser is diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from finetune.families.base import ModelFamily
from finetune.families.notes import unet_notes


class UNetFamily(ModelFamily):
    """A UNet over a picture of latents, text read by cross-attention."""

    denoiser = "unet"
    bucket_multiple = 64
    reading_options = frozenset({"clip_skip", "prompt_chunks"})

    def latent_multiple(self, denoiser: nn.Module) -> int:
        """The UNet halves once per level but the last."""
        config: Any = denoiser.config
        return int(2 ** (len(config.block_out_channels) - 1))

    def notes(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> list[str]:
        """See `ModelFamily.notes`."""
        return unet_notes(denoiser_config, scheduler_config)

    def is_ours(self, model_index: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> bool:
        """Whether a pipeline is of this family's class and its UNet reads what that class shows it: the noisy latents,
        or in an inpainting model the mask and the masked picture as well.
        """
        plain = denoiser_config.get("in_channels") == denoiser_config.get("out_channels")
        known = model_index.get("_class_name") in {self.pipeline_class, self.inpainting_class}
        unet = denoiser_config.get("_class_name") == "UNet2DConditionModel"
        return known and unet and (plain or (self.inpainting_class is not None and self.repaints(denoiser_config)))
