"""The embedded base's UNet: built, fed with latents and captions, trained on v-prediction.

Two stages. The first learns what things look like: large objects in the middle, then other sizes and places. The
second goes on from its average with what is hard: small objects, everything named at once, two objects in a relation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.demo.build.autoencoder import LATENT_CHANNELS
from finetune.demo.build.loop import LossFunction, initialise
from finetune.demo.scenes import RESOLUTION, Scene, caption, draw_array, place, random_scene
from finetune.objectives import Objective, build_objective

NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
}
"""The noise schedule under the names of a scheduler's configuration."""
# Empty captions teach the unconditional half of classifier-free guidance.
EMPTY_CAPTIONS = 0.1
# Share of the first stage spent on single plain objects before anything else is mixed in, and how much is mixed in.
SIMPLE_FIRST, MIXED_SHARE = 0.6, 0.12
# Up to this share of the first stage most pictures show a large object in the middle, because shapes are the hardest
# to learn; later most show one of another size or elsewhere. FORCED of the pictures are drawn from that half alone.
LARGE_FIRST, FORCED = 0.5, 0.6
# The second stage: share of its pictures from every set of `Drawn`, by name.
DETAIL_SHARES = {"single": 0.3, "varied": 0.35, "pairs": 0.25, "mixed": 0.1}


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


@dataclass(frozen=True)
class Mix:
    """What kinds of scenes a set of pictures holds; the arguments of `random_scene`."""

    plain: float
    mixed: float = 0.0
    small: float = 0.3
    pairs: float = 0.5

    def scene(self, seed: int, index: int) -> Scene:
        """The scene with this number."""
        return random_scene(np.random.default_rng((seed, index)), self.plain, self.mixed, self.small, self.pairs)


def drawn_pictures(seed: int, indices: range, mix: Mix) -> np.ndarray:
    """Pictures of the scenes with these indices; uint8 (N, 64, 64, 3)."""
    return np.stack([draw_array(mix.scene(seed, index)) for index in indices])


@dataclass(frozen=True)
class Drawn:
    """A share of the training pictures: scenes are functions of (seed, index), so only latents are stored."""

    seed: int
    mix: Mix
    latents: Tensor
    """float16 (N, 8, 16, 16)."""

    def scene(self, index: int) -> Scene:
        """What the stored picture shows."""
        return self.mix.scene(self.seed, index)

    def split(self) -> tuple[list[int], list[int]]:
        """Indices of the pictures with a large object in the middle, and of all others."""
        scenes = [self.scene(index) for index in range(len(self.latents))]
        large = [(s.size, s.position) == ("large", "center") for s in scenes]
        return [i for i, hit in enumerate(large) if hit], [i for i, hit in enumerate(large) if not hit]


class Conditioned(nn.Module):
    """UNet and text encoder as one module, because both are trained."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predicted velocity; shapes (B, 8, 16, 16), (B,), (B, 32)."""
        states = self.text_encoder(input_ids=tokens).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=states).sample


# (share of the budget used, 0..1; source of draws) -> a set and the index of a picture in it
Chooser = Callable[[float, np.random.Generator], tuple[Drawn, int]]


def large_first(single: Drawn, mixed: Drawn) -> Chooser:
    """The first stage's curriculum: large objects, then all sizes and places, at last a few of everything else."""
    large, others = single.split()

    def choose(share: float, rng: np.random.Generator) -> tuple[Drawn, int]:
        if share > SIMPLE_FIRST and rng.random() < MIXED_SHARE:
            return mixed, int(rng.integers(len(mixed.latents)))
        index = int(rng.integers(len(single.latents)))
        if rng.random() < FORCED:
            wanted = large if share < LARGE_FIRST else others
            index = wanted[index % len(wanted)]
        return single, index

    return choose


def details(sets: dict[str, Drawn]) -> Chooser:
    """The second stage's mix, DETAIL_SHARES, from its first step to its last."""
    names = list(DETAIL_SHARES)

    def choose(share: float, rng: np.random.Generator) -> tuple[Drawn, int]:
        drawn = sets[names[int(rng.choice(len(names), p=list(DETAIL_SHARES.values())))]]
        return drawn, int(rng.integers(len(drawn.latents)))

    return choose


def object_mask(scenes: Sequence[Scene], side: int = 16) -> Tensor:
    """Weights that let the squares around a picture's objects and all the rest share its loss equally.

    A small object covers a tenth of the picture; without weights its shape hardly counts. Weights of places do not
    move the optimum, which is the mean of what is possible at every place.

    Returns:
        shape (B, 1, side, side), in (0, 1].
    """
    rows = (torch.arange(side) + 0.5) * RESOLUTION / side
    masks = []
    for scene in scenes:
        x, y, radius = place(scene, RESOLUTION, RESOLUTION)
        spots = [(x, y)] + [(RESOLUTION - x, RESOLUTION - y)] * (scene.second is not None)
        near = torch.zeros(side, side, dtype=torch.bool)
        for x, y in spots:
            near |= ((rows - y).abs() < radius + 2)[:, None] & ((rows - x).abs() < radius + 2)[None]
        area = near.float().mean().clamp(1 / side**2, 1 - 1 / side**2)
        weights = torch.where(near, 1 / area, 1 / (1 - area))
        masks.append(weights / weights.max())
    return torch.stack(masks)[:, None]


def caption_of(scene: Scene, rng: np.random.Generator) -> str:
    """One of the captions of a picture, or the empty one."""
    if rng.random() < EMPTY_CAPTIONS:
        return ""
    return caption(scene, rng)


def objective_of_base() -> Objective:
    """What the base is asked: the project's own objective on the base's own schedule."""
    return build_objective(NOISE)


def denoising_loss(
    model: Conditioned, tokenizer: CLIPTokenizer, choose: Chooser, batch: int, *, even: bool = False
) -> LossFunction:
    """The loss of one step: mean squared error of the velocity over stratified noise levels.

    Args:
        model: UNet and text encoder.
        tokenizer: of the captions.
        choose: picks every picture of a batch.
        batch: pictures per step and worker.
        even: weigh places by `object_mask`.
    """
    objective = objective_of_base()

    def loss_of(share: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = [choose(share, rng) for _ in range(batch)]
        scenes = [drawn.scene(index) for drawn, index in chosen]
        latents = torch.stack([drawn.latents[index] for drawn, index in chosen]).float()
        captions = [caption_of(scene, rng) for scene in scenes]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        timesteps = objective.timesteps((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = objective.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps, tokens)
        mask = object_mask(scenes) if even else None
        return objective.loss(predicted, latents, noise, timesteps, mask).mean()

    return loss_of
