"""What a base model is: the types every family speaks in. Facts first, then actions on tensors.

A family never sees a configuration, never moves anything between devices and never computes a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides the noisy latents, under the denoiser's own keyword names; batch first.

Caching and collating need not understand it: every tensor is stored, stacked and passed on under its name.
"""


@dataclass(frozen=True)
class Latents:
    """The autoencoder's answer for a batch: a Gaussian per latent, already scaled the way the denoiser expects.

    Both mean and standard deviation are kept, so that a cache freezes no noise.

    Attributes:
        mean: shape (B, C, h, w).
        std: same shape, not negative.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for one standard normal draw `noise` of the same shape."""
        return self.mean + self.std * noise


@dataclass(frozen=True)
class SizeConditioning:
    """How each picture was cut, in pixels, (height, width); every field has shape (B, 2).

    SDXL is told this; SD1.x ignores it.
    """

    original_size: Tensor
    crop_top_left: Tensor
    target_size: Tensor


@dataclass
class Components:
    """A loaded base model, part by part.

    Attributes:
        text_encoders: in the pipeline's own naming and order, e.g. {"text_encoder": ..., "text_encoder_2": ...}.
        tokenizers: under the same keys as their text encoders.
        scheduler_config: the checkpoint's own noise schedule, e.g. {"prediction_type": "epsilon", ...}.
        source: what the user called the base model: a folder name, a hub id or "demo"; never an absolute path.
        digest: SHA-256 over the weights' content, 64 hex digits; identifies the base in checkpoints and files.
        digests: the same per part, keys as in `modules()`; caches depend on one part only.
    """

    denoiser: nn.Module
    vae: nn.Module | None
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    source: str
    digest: str
    digests: dict[str, str] = field(default_factory=dict)

    def modules(self) -> dict[str, nn.Module]:
        """Every network by its pipeline name: the denoiser, the text encoders, and the autoencoder if it is loaded."""
        named: dict[str, nn.Module] = {"denoiser": self.denoiser, **self.text_encoders}
        if self.vae is not None:
            named["vae"] = self.vae
        return named


class ModelFamily(ABC):
    """One kind of base model. Subclasses state facts and implement four actions; they hold no state."""

    name: ClassVar[str]
    """The family's name in tables, files and messages: "sd1"."""
    denoiser: ClassVar[str]
    """What the pipeline calls its denoiser: "unet" or "transformer"; also the prefix of its parameters on disk."""
    pipeline_class: ClassVar[str]
    """The diffusers pipeline class that loads and samples this family."""
    text_encoders: ClassVar[tuple[str, ...]]
    """The pipeline's text encoders, in order."""
    resolution: ClassVar[int]
    """The side of a square picture the published base was trained on, in pixels."""
    bucket_multiple: ClassVar[int]
    """Bucket sides are multiples of this, in pixels."""
    modelspec_architecture: ClassVar[str]
    """The architecture id of Stability-AI/ModelSpec 1.0.1, without the "/lora" suffix."""
    kohya_base_version: ClassVar[str]
    """The value readers expect under `ss_base_model_version`."""
    kohya_prefixes: ClassVar[dict[str, str]]
    """Prefix of adapter keys in kohya layout, e.g. {"denoiser": "lora_unet", "text_encoder": "lora_te"}."""
    target_presets: ClassVar[dict[str, dict[str, str]]]
    """preset -> component kind ("denoiser" or a text encoder's name) -> regular expression over module names."""

    @abstractmethod
    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this `model_index.json` and denoiser configuration is of this family."""

    @abstractmethod
    def encode_images(self, vae: nn.Module, pixel_values: Tensor) -> Latents:
        """Encode pictures of shape (B, 3, H, W) in [-1, 1] into scaled latents of shape (B, C, h, w)."""

    @abstractmethod
    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Decode scaled latents of shape (B, C, h, w) into pictures of shape (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> Conditioning:
        """Encode token ids, one tensor of shape (B, length) per text encoder, into the denoiser's conditioning."""

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning,
    ) -> Tensor:
        """The denoiser's raw prediction, shape of `noisy_latents`; `timesteps` (B,) in the model's own unit."""

    def tokenize(self, tokenizers: dict[str, Any], prompts: list[str]) -> dict[str, Tensor]:
        """Token ids per text encoder, padded to the encoder's own length; shape (B, length), int64.

        Captions longer than the encoder reads are cut; `data` counts and reports them before a run starts.
        """
        return {
            name: tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for name, tokenizer in tokenizers.items()
        }

    def native_resolution(self, components: Components) -> int:
        """The side, in pixels, of a square picture for this very checkpoint, from its denoiser's own sample size."""
        config: Any = components.denoiser.config
        size = getattr(config, "sample_size", None)
        return int(size) * self.vae_stride(components.vae) if size and components.vae is not None else self.resolution

    def vae_stride(self, vae: nn.Module) -> int:
        """Pixels per latent along one side."""
        config: Any = vae.config
        return 2 ** (len(config.block_out_channels) - 1)

    @staticmethod
    def device_of(module: nn.Module) -> torch.device:
        """Where a network lives."""
        return next(module.parameters()).device
