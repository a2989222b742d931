"""What a base model is: the types every family speaks in. Facts first, then actions on tensors.

A family never sees a configuration, never moves anything between devices and never computes a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finetune.devices import let_go
from finetune.families import reading
from finetune.families.frozen import let_go_host
from finetune.families.original_keys import Layout
from finetune.families.text import spelled_out

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


@dataclass(frozen=True)
class Reading:
    """How prompts are read where a family leaves a choice, to the user or to the checkpoint.

    Attributes:
        clip_skip: which layer of the CLIP encoders is read, counted from their end: 1 is the last, 2 the one before.
            None means the family's own.
        prompt_chunks: how many times 75 tokens of a prompt CLIP reads; the embeddings stand one behind the other.
        t5_tokens: how many tokens T5 reads. None means the family's own.
        guidance: the guidance strength that a guidance-distilled denoiser is told.
        zero_empty: whether an empty prompt means zeros instead of the encoded empty text, as the checkpoint's pipeline
            says for guidance.
        width: of one encoded token, where the denoiser must say it because the encoder that would may be missing.
    """

    clip_skip: int | None = None
    prompt_chunks: int = 1
    t5_tokens: int | None = None
    guidance: float = 1.0
    zero_empty: bool = False
    width: int | None = None


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
        pipeline_config: the checkpoint's own switches of its pipeline, e.g. {"force_zeros_for_empty_prompt": True}.
        notes: what the user should know of this very checkpoint before training on it, e.g. that it is distilled.
    """

    denoiser: nn.Module
    vae: nn.Module | None
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    source: str
    digest: str
    digests: dict[str, str] = field(default_factory=dict)
    pipeline_config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def modules(self) -> dict[str, nn.Module]:
        """Every network by its pipeline name: the denoiser, the text encoders, and the autoencoder if it is loaded."""
        named: dict[str, nn.Module] = {"denoiser": self.denoiser, **self.text_encoders}
        if self.vae is not None:
            named["vae"] = self.vae
        return named

    def let_go(self) -> None:
        """Free all weights when their turn is over; shapes and configurations stay."""
        for network in self.modules().values():
            let_go_host(network)
        let_go(self.modules().values())

    def drawing(self) -> list[nn.Module]:
        """What is needed all through drawing: the denoiser and the autoencoder. Text encoders only visit."""
        return [self.denoiser, *([self.vae] if self.vae is not None else [])]


@dataclass(frozen=True)
class ModelFamily(ABC):
    """One kind of base model: facts first, then actions on tensors. It holds nothing but how prompts are read."""

    reading: Reading = Reading()

    name: ClassVar[str]
    """The family's name in tables, files and messages: "sd1"."""
    denoiser: ClassVar[str]
    """What the pipeline calls its denoiser: "unet" or "transformer"; also the prefix of its parameters on disk."""
    pipeline_class: ClassVar[str]
    """The diffusers pipeline class that loads and samples this family."""
    inpainting_class: ClassVar[str | None] = None
    """The one for a denoiser that is also shown a mask and the masked picture; None where there is none."""
    text_encoders: ClassVar[tuple[str, ...]]
    """The pipeline's text encoders, in order."""
    optional_text_encoders: ClassVar[frozenset[str]] = frozenset()
    """Those that a checkpoint may lack."""
    resolution: ClassVar[int]
    """The side of a square picture the published base was trained on, in pixels."""
    bucket_multiple: ClassVar[int]
    """Bucket sides are multiples of this, in pixels."""
    modelspec_architecture: ClassVar[str]
    """The architecture id of Stability-AI/ModelSpec 1.0.1, without the "/lora" suffix; see `modelspec`."""
    kohya_base_version: ClassVar[str]
    """The value readers expect under `ss_base_model_version`."""
    kohya_prefixes: ClassVar[dict[str, str]]
    """Prefix of adapter keys in kohya layout, e.g. {"denoiser": "lora_unet", "text_encoder": "lora_te"}."""
    target_presets: ClassVar[dict[str, dict[str, str]]]
    """preset -> component kind ("denoiser" or a text encoder's name) -> regular expression over module names."""
    denoiser_unread: ClassVar[str | None] = None
    """Denoiser layers whose output nothing reads, so that they cannot learn: a regular expression, {last} standing for
    the number of the last block."""
    clip_layer: ClassVar[int] = 1
    """Which layer of the CLIP encoders is read unless `Reading.clip_skip` says otherwise, counted from their end."""
    pooled_encoders: ClassVar[frozenset[str]] = frozenset()
    """CLIP encoders whose pooled output is read too, so that all their layers learn."""
    t5_tokens: ClassVar[dict[str, int]] = {}
    """T5 encoders of this family, and how many tokens they read unless `Reading.t5_tokens` says otherwise."""
    reading_options: ClassVar[frozenset[str]]
    """Fields of `Reading` that a user may set for this family."""
    skeletons: ClassVar[tuple[str, ...]]
    """Published shapes of this family, the usual one first: names of configurations shipped in `skeletons`."""
    original: ClassVar[Mapping[str, Layout]]
    """pipeline name -> how that network stands in an original single file."""
    pipeline_prompts: ClassVar[dict[str, str]]
    """Name in `Conditioning` -> argument of the pipeline's call; "negative_" goes in front of it for guidance."""
    usual_guidance: ClassVar[float] = 7.5
    """Guidance strength that published pictures of this family are usually made with."""
    distilled_guidance: ClassVar[bool] = False
    """Whether the denoiser is told the guidance strength, so that no negative prompt is read."""
    hands_sigmas: ClassVar[bool] = False
    """Whether the pipeline gives its sampler noise levels that depend on the picture's size."""
    packing: ClassVar[int] = 1
    """Side of the square of latents that the pipeline's own latents hold in one token; 1 when they are a picture."""
    pipeline_starts_from_picture: ClassVar[bool] = False
    """Whether the pipeline repaints a picture; from pure noise it then starts with empty latents and strength 1."""

    @abstractmethod
    def matches(self, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this `model_index.json` and denoiser configuration is of this family."""

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
        """The denoiser's raw prediction, shape (B, C, h, w).

        Args:
            noisy_latents: (B, C, h, w); with what an inpainting denoiser is shown behind them, (B, 2 C + 1, h, w): the
                mask, 1 where the picture is hidden, then the latents of the picture that is left.
            timesteps: (B,), in the model's own unit.
        """

    @abstractmethod
    def latent_multiple(self, denoiser: nn.Module) -> int:
        """What the sides of latents must be divisible by, so that the denoiser can halve or patch them."""

    @abstractmethod
    def notes(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> list[str]:
        """What a user should know of a checkpoint with this configuration before training on it."""

    def modelspec(self, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> str:
        """The ModelSpec architecture id of this very checkpoint."""
        return self.modelspec_architecture

    def encode_images(self, vae: nn.Module, pixel_values: Tensor) -> Latents:
        """Encode pictures of shape (B, 3, H, W) in [-1, 1] into scaled latents of shape (B, C, h, w).

        Scale, shift and per-channel statistics are those of the autoencoder's own configuration.
        """
        posterior = cast(Any, vae).encode(pixel_values).latent_dist
        shift, scale = _normalisation(vae, posterior.mean)
        return Latents(mean=(posterior.mean - shift) * scale, std=posterior.std * scale)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Decode scaled latents of shape (B, C, h, w) into pictures of shape (B, 3, H, W) in [-1, 1]."""
        shift, scale = _normalisation(vae, latents)
        return cast(Tensor, cast(Any, vae).decode(latents / scale + shift).sample)

    def tokenize(self, tokenizers: dict[str, Any], prompts: list[str]) -> dict[str, Tensor]:
        """Token ids per text encoder, padded to what the encoder reads; shape (B, length), int64.

        Captions longer than that are cut; `data` counts and reports them before a run starts.
        """
        return {
            name: reading.t5_ids(tokenizer, spelled_out(tokenizer, prompts), self.token_limit(name, tokenizer))
            if name in self.t5_tokens
            else reading.clip_ids(tokenizer, spelled_out(tokenizer, prompts), self.reading.prompt_chunks)
            for name, tokenizer in tokenizers.items()
        }

    def token_limit(self, name: str, tokenizer: Any) -> int:
        """How many tokens of a prompt the text encoder `name` reads, begin and end marks included."""
        if name in self.t5_tokens:
            return self.reading.t5_tokens or self.t5_tokens[name]
        return (int(tokenizer.model_max_length) - 2) * self.reading.prompt_chunks + 2

    def usual_encoders(self) -> tuple[str, ...]:
        """The text encoders that are trained when none is named: the CLIPs.

        T5 is left out: it is larger than most denoisers, and no program reads adapters for it.
        """
        return tuple(name for name in self.text_encoders if name not in self.t5_tokens)

    def hidden_layer(self) -> int:
        """Which layer of the CLIP encoders is read, counted from their end."""
        return self.reading.clip_skip or self.clip_layer

    def targets(self, preset: str, component: str, module: nn.Module) -> str:
        """The layers of one network that a preset means: a regular expression over whole module names.

        Layers that nothing reads are left out, for they would never learn; an expression that is no preset stays as it
        is.

        Args:
            component: "denoiser" or a text encoder's name.
            module: that network.
        """
        if preset not in self.target_presets:
            return preset
        unread = self.unread(component, module)
        pattern = self.target_presets[preset][component]
        return f"(?!{unread})(?:{pattern})" if unread else pattern

    def unread(self, component: str, module: nn.Module) -> str | None:
        """A regular expression for the layers of a network whose output nothing reads; None if all are read."""
        config: Any = module.config
        if component == "denoiser":
            blocks = getattr(config, "num_layers", None)
            return self.denoiser_unread.format(last=blocks - 1) if self.denoiser_unread and blocks else None
        if component in self.t5_tokens or component in self.pooled_encoders:
            return None
        count = int(config.num_hidden_layers)
        numbers = range(count - self.hidden_layer() + 1, count)
        unread = [rf"layers\.({'|'.join(map(str, numbers))})\."] if numbers else []
        # keep: families that read an inner layer by default read it as it is, without the final norm.
        unread += ["final_layer_norm"] if self.clip_layer > 1 else []
        return rf".*\b({'|'.join(unread)})" if unread else None

    def native_resolution(self, components: Components) -> int:
        """The side, in pixels, of a square picture for this very checkpoint, from its denoiser's own sample size."""
        config: Any = components.denoiser.config
        size = getattr(config, "sample_size", None)
        return int(size) * self.vae_stride(components.vae) if size and components.vae is not None else self.resolution

    def vae_stride(self, vae: nn.Module) -> int:
        """Pixels per latent along one side."""
        config: Any = vae.config
        return int(2 ** (len(config.block_out_channels) - 1))

    def smallest_multiple(self, components: Components) -> int:
        """What picture sides must be divisible by so that autoencoder and denoiser divide them evenly, in pixels."""
        assert components.vae is not None, "the autoencoder is loaded with the base and dropped after caching"
        return self.vae_stride(components.vae) * self.latent_multiple(components.denoiser)

    def input_channels(self, denoiser: nn.Module) -> int:
        """Channels of what `predict` is given: the noisy latents, and what an inpainting denoiser is shown besides."""
        config: Any = denoiser.config
        return int(config.in_channels) // self.packing**2

    def repaints(self, denoiser_config: Mapping[str, Any]) -> bool:
        """Whether the denoiser is an inpainting one: also shown a mask and the latents of the picture outside of it.

        Source: Rombach et al. 2022, arXiv:2112.10752, section 4.5, as in the inpainting models of Runway and Stability.
        """
        latents = denoiser_config.get("out_channels") or 0
        return bool(latents) and denoiser_config.get("in_channels") == 2 * latents + 1

    def pipeline_for(self, denoiser_config: Mapping[str, Any]) -> str:
        """The diffusers pipeline class that loads and samples this very checkpoint."""
        return (self.inpainting_class if self.repaints(denoiser_config) else None) or self.pipeline_class

    def as_picture(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's own latents as (B, C, h, w); `height` and `width` count latents."""
        if self.packing == 1:
            return latents
        return reading.unpack(latents, height, width, self.packing)

    @staticmethod
    def device_of(module: nn.Module) -> torch.device:
        """Where a network lives."""
        return next(module.parameters()).device


def _normalisation(vae: nn.Module, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(shift, scale) of latents = (encoded - shift) * scale, from the autoencoder's configuration."""
    config: Any = vae.config
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return shift, scale
    shape = (1, -1, 1, 1)
    return like.new_tensor(mean).view(shape), scale / like.new_tensor(std).view(shape)
