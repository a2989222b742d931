"""The embedded base's UNet: built, fed with latents and captions, trained on v-prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.demo.autoencoder import LATENT_CHANNELS
from finetune.demo.loop import LossFunction, Progress, Settings, initialise, train
from finetune.demo.world import Scene, caption, draw_array, random_scene

TIMESTEPS = 1000
BETAS = (1e-4, 0.02)
# Empty captions teach the unconditional half of classifier-free guidance.
EMPTY_CAPTIONS = 0.1
# Share of the budget spent on single plain objects before anything else is mixed in.
SIMPLE_FIRST = 0.6
# Up to this share of the budget most pictures show a large object in the middle, because shapes are the hardest to
# learn; later most show one of another size or elsewhere. FORCED of the pictures are drawn from that half alone.
LARGE_FIRST, FORCED = 0.5, 0.6


def new_unet(width: int = 128, seed: int = 2, channels: tuple[int, ...] = (64, 128, 128)) -> UNet2DConditionModel:
    """A UNet with cross-attention at its lower levels and fresh weights; `width` is the text encoder's."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(channels) - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    initialise(unet, torch.Generator().manual_seed(seed))
    return unet.to(memory_format=torch.channels_last)


def signal_and_noise() -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of the linear DDPM schedule; shape (1000,) each. Source: Ho et al. 2020, arXiv:2006.11239."""
    betas = torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64)
    cumulated = torch.cumprod(1 - betas, 0)
    return cumulated.sqrt().float(), (1 - cumulated).sqrt().float()


def v_target(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict.

    Args:
        latents: x_0; shape (B, C, h, w).
        noise: unit normal; same shape.
        alpha: signal share per sample; shape (B,).
        sigma: noise share per sample; shape (B,).

    Returns:
        alpha x_0 + sigma noise, and alpha noise - sigma x_0; same shape each.

    Source: Salimans and Ho 2022, Progressive distillation, arXiv:2202.00512.
    """
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    return a * latents + s * noise, a * noise - s * latents


@dataclass(frozen=True)
class Drawn:
    """A share of the training pictures: scenes are functions of (seed, index), so only latents are stored."""

    seed: int
    plain: float
    mixed: float
    latents: Tensor
    """float16 (N, 8, 16, 16)."""

    def scene(self, index: int) -> Scene:
        """What the stored picture shows."""
        return random_scene(np.random.default_rng((self.seed, index)), self.plain, self.mixed)

    def split(self) -> tuple[list[int], list[int]]:
        """Indices of the pictures with a large object in the middle, and of all others."""
        scenes = [self.scene(index) for index in range(len(self.latents))]
        large = [(s.size, s.position) == ("large", "center") for s in scenes]
        return [i for i, hit in enumerate(large) if hit], [i for i, hit in enumerate(large) if not hit]


def drawn_pictures(seed: int, indices: range, plain: float, mixed: float) -> np.ndarray:
    """Pictures of the scenes with these indices; uint8 (N, 64, 64, 3)."""
    return np.stack([draw_array(random_scene(np.random.default_rng((seed, i)), plain, mixed)) for i in indices])


class Conditioned(nn.Module):
    """UNet and text encoder as one module, because both are trained."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predicted velocity; shapes (B, 8, 16, 16), (B,), (B, 32)."""
        states = self.text_encoder(input_ids=tokens).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=states).sample


def caption_of(drawn: Drawn, index: int, rng: np.random.Generator) -> str:
    """One of the captions of a stored picture, or the empty one."""
    if rng.random() < EMPTY_CAPTIONS:
        return ""
    return caption(drawn.scene(index), rng)


def denoising_loss(
    model: Conditioned,
    tokenizer: CLIPTokenizer,
    single: Drawn,
    mixed: Drawn,
    *,
    mixed_share: float,
    batch: int,
) -> LossFunction:
    """The loss of one step: mean squared error of the velocity over stratified noise levels."""
    alphas, sigmas = signal_and_noise()
    large, others = single.split()

    def loss_of(share: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        extra = mixed_share if share > SIMPLE_FIRST else 0.0
        sources = [mixed if rng.random() < extra else single for _ in range(batch)]
        indices = [int(rng.integers(len(source.latents))) for source in sources]
        wanted = large if share < LARGE_FIRST else others
        forced = [source is single and rng.random() < FORCED for source in sources]
        indices = [wanted[i % len(wanted)] if force else i for i, force in zip(indices, forced, strict=True)]
        latents = torch.stack([s.latents[i] for s, i in zip(sources, indices, strict=True)]).float()
        captions = [caption_of(s, i, rng) for s, i in zip(sources, indices, strict=True)]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        levels = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (levels * TIMESTEPS).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy, target = v_target(latents, noise, alphas[timesteps], sigmas[timesteps])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy.contiguous(memory_format=torch.channels_last), timesteps, tokens)
        return (predicted.float() - target).square().mean()

    return loss_of


def train_denoiser(
    model: Conditioned,
    tokenizer: CLIPTokenizer,
    single: Drawn,
    mixed: Drawn,
    *,
    mixed_share: float,
    settings: Settings,
) -> Progress:
    """Train UNet and text encoder together; the weights in `model` become the averaged ones."""
    return train(
        model,
        settings,
        denoising_loss(model, tokenizer, single, mixed, mixed_share=mixed_share, batch=settings.batch),
    )
