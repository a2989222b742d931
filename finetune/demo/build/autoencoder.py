"""The embedded base's autoencoder: 64 x 64 pictures to 8 x 16 x 16 latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from finetune.demo.build.loop import Progress, Settings, initialise, train
from finetune.demo.build.pictures import autoencoder_picture

LATENT_CHANNELS = 8


def new_autoencoder(seed: int = 0, channels: tuple[int, ...] = (16, 32, 64)) -> AutoencoderKL:
    """Fresh weights. The posterior starts narrow: at the default width its noise swamps the mean of a tiny model."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )
    initialise(vae, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:].zero_()
        vae.quant_conv.bias[LATENT_CHANNELS:].fill_(-6.0)
    return vae.to(memory_format=torch.channels_last)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in -1..1, channels last in memory."""
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels.contiguous(memory_format=torch.channels_last)


def draw_pictures(file: Path, count: int, seed: int) -> np.ndarray:
    """Draw the training pictures once; returns a memory map of uint8 (count, 64, 64, 3)."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new.npy")
        pictures = np.lib.format.open_memmap(beside, "w+", np.uint8, (count, 64, 64, 3))
        for index in range(count):
            pictures[index] = autoencoder_picture(np.random.default_rng((seed, index)))
        pictures.flush()
        beside.replace(file)
    return np.load(file, mmap_mode="r")


def reconstruction_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """Absolute error keeps edges sharp, squared error is what PSNR counts; pixels in -1..1."""
    difference = output.float() - pixels
    return difference.abs().mean() + 2.0 * difference.square().mean()


def train_autoencoder(vae: AutoencoderKL, pictures: np.ndarray, settings: Settings) -> Progress:
    """Train encoder and decoder together; the weights in `vae` become the averaged ones."""

    def loss_of(share: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        pixels = to_pixels(pictures[np.sort(rng.integers(len(pictures), size=settings.batch))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return reconstruction_loss(output, pixels) + 1e-4 * divergence

    return train(vae, settings, loss_of)


@torch.no_grad()
def widened(vae: AutoencoderKL, seed: int = 4) -> AutoencoderKL:
    """The same function with twice the channels, so that its decoder can learn more while its latents stay valid.

    Every channel is doubled, and the two copies share the channel's outgoing weights unevenly, so that training tells
    them apart. Copies lie side by side, hence in one group of a group norm, whose statistics they do not change.

    Source: Chen et al. 2015, Net2Net, arXiv:1511.05641.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = new_autoencoder(channels=tuple(2 * channels for channels in vae.config.block_out_channels))
    narrow, state = vae.state_dict(), {}
    for name, place in wide.state_dict().items():
        tensor = narrow[name]
        if place.shape[0] > tensor.shape[0]:
            tensor = tensor.repeat_interleave(2, 0)
        if place.dim() > 1 and place.shape[1] > tensor.shape[1]:
            share = torch.rand(tensor.shape[:2], generator=generator).view(*tensor.shape[:2], *[1] * (place.dim() - 2))
            tensor = torch.stack([tensor * share, tensor * (1 - share)], 2).flatten(1, 2)
        if ".to_q." in name:
            tensor = tensor / 2**0.5  # attention divides by the root of its width, and sums over twice as many products
        state[name] = tensor
    wide.load_state_dict(state)
    return wide.to(memory_format=torch.channels_last)


def train_decoder(vae: AutoencoderKL, pictures: np.ndarray, latents: Tensor, settings: Settings) -> Progress:
    """Go on with the decoder alone, so that latents made by the encoder stay valid.

    Args:
        vae: trained in place; ends up with the averaged weights.
        pictures: uint8 (N, 64, 64, 3).
        latents: what the encoder makes of them; float16 (N, 8, 16, 16).
        settings: of the stage.
    """
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of(share: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = np.sort(rng.integers(len(pictures), size=settings.batch))
        pixels, given = to_pixels(pictures[chosen]), latents[chosen].float()
        # A little noise, because the denoiser's latents are never exact.
        given = given + 0.05 * torch.randn(given.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = vae.decode(given.contiguous(memory_format=torch.channels_last)).sample
        return reconstruction_loss(output, pixels)

    progress = train(vae, settings, loss_of)
    vae.requires_grad_(True)
    return progress


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """Latent means of uint8 pictures (N, H, W, 3); float16 (N, 8, H/4, W/4)."""
    parts = []
    for start in range(0, len(pictures), batch):
        pixels = to_pixels(pictures[start : start + batch])
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(pixels).latent_dist.mean.half())
    return torch.cat(parts)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[list[float], list[float]]:
    """Fold the mean and deviation of every latent channel into the 1 x 1 convolutions beside the latents.

    Afterwards latents have zero mean and unit variance, `scaling_factor` is 1 and reconstructions are unchanged.
    Returns the means and deviations that were folded in.
    """
    latents = encode(vae, pictures).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant: nn.Conv2d = vae.quant_conv
    post: nn.Conv2d = vae.post_quant_conv
    channels = LATENT_CHANNELS
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    # keep: the other half of quant_conv's output is the log-variance; a scale of 1 / std shifts it.
    quant.bias[channels:] -= 2.0 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
    return mean.tolist(), std.tolist()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 50) -> np.ndarray:
    """Encode and decode uint8 pictures (N, H, W, 3) in float32."""
    parts = []
    for start in range(0, len(pictures), batch):
        pixels = to_pixels(pictures[start : start + batch])
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        parts.append(((output.clamp(-1, 1) + 1) * 127.5 + 0.5).permute(0, 2, 3, 1).to(torch.uint8).numpy())
    return np.concatenate(parts)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; uint8 (N, H, W, 3)."""
    error = ((first.astype(np.float64) - second) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-3))))
