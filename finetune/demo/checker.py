"""A small network that says what a demo picture shows, so that prompt following is a number.

It was trained on true pictures and on what the autoencoder makes of them; the card in `finetune/demo/base` says how
often it errs. It also knows the demo subjects, which the base model does not, and "none" for what is no object. Of a
picture with two objects it names both by their place, because "a ball left of a box" is also a box right of a ball.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.demo import CHECKER_FILE
from finetune.demo.scenes import COLOURS, LAYOUTS, POSITIONS, RESOLUTION, SIZES, TEXTURES
from finetune.demo.shapes import OBJECTS
from finetune.demo.subjects import SUBJECTS

NONE = "none"
NAMES: dict[str, tuple[str, ...]] = {
    "object": (*OBJECTS, *(f"{s.trigger} {s.class_word}" for s in SUBJECTS.values()), NONE),
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "style": ("flat", "outline", "neon"),
    "texture": TEXTURES,
    "layout": LAYOUTS,
    "first": tuple(OBJECTS),
    "first_colour": tuple(COLOURS),
    "second": tuple(OBJECTS),
    "second_colour": tuple(COLOURS),
}
"""Attribute -> possible answers. `object` to `position` are about a single object; `first` is the left or upper one of
two, `second` the other."""
FEATURES = 128


class CheckerNet(nn.Module):
    """Five strided convolutions, one feature vector, a linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 24, 2), (24, 48, 2), (48, 96, 2), (96, 96, 1), (96, 64, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in NAMES.items()})

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, 128) and logits per attribute for pixels (B, 3, 64, 64) in -1..1."""
        features = self.trunk(pixels)
        return features, {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Verdict:
    """What one picture shows: the likeliest name of every attribute and how likely it is (0..1).

    All attributes get an answer, also those that do not apply: read `first` and `second` only if `layout` is not
    "alone", and `object`, `colour`, `size` and `position` only if it is.
    """

    object: str
    colour: str
    background: str
    size: str
    position: str
    style: str
    texture: str
    layout: str
    first: str
    first_colour: str
    second: str
    second_colour: str


class Checker:
    """The trained network with the names of its answers."""

    def __init__(self, net: CheckerNet):
        self.net = net.eval()

    @torch.no_grad()
    def judge(self, images: Sequence[Image.Image] | Tensor, batch: int = 100) -> list[Verdict]:
        """One verdict per picture; pictures, or pixels (N, 3, H, W) in -1..1."""
        pixels = as_pixels(images)
        found: list[Verdict] = []
        for part in pixels.split(batch):
            _, logits = self.net(part)
            best = {name: values.argmax(-1).tolist() for name, values in logits.items()}
            found += [
                Verdict(**{name: NAMES[name][indices[row]] for name, indices in best.items()})
                for row in range(len(part))
            ]
        return found

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image] | Tensor, batch: int = 100) -> Tensor:
        """Feature vectors for distances between pictures; shape (N, 128), no unit."""
        return torch.cat([self.net(part)[0] for part in as_pixels(images).split(batch)])


def as_pixels(images: Sequence[Image.Image] | Tensor) -> Tensor:
    """Pictures as (N, 3, 64, 64) in -1..1; other sizes are averaged or interpolated to 64 x 64."""
    if not isinstance(images, Tensor):
        side = (RESOLUTION, RESOLUTION)
        fitted = [i.convert("RGB") if i.size == side else i.convert("RGB").resize(side, Image.Resampling.BICUBIC)
                  for i in images]  # fmt: skip
        stacked = np.stack([np.asarray(image) for image in fitted])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    pixels = images.float()
    if pixels.shape[-2:] != (RESOLUTION, RESOLUTION):
        pixels = nn.functional.interpolate(pixels, (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)
    return pixels.clamp(-1, 1)


def load_checker(path: Path | None = None) -> Checker:
    """The checker that comes with the package, or the one in another safetensors file."""
    net = CheckerNet()
    net.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                         for name, tensor in load_file(path or CHECKER_FILE).items()})  # fmt: skip
    return Checker(net)


def score(verdicts: Sequence[Verdict], expected: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of pictures that show what was asked for.

    Args:
        verdicts: what the pictures show.
        expected: for every picture, attribute -> name; attributes that were not asked for are absent.

    Returns:
        Attribute -> share right (0..1) among the pictures where it was asked for; "all" is the share of pictures with
        every asked attribute right.
    """
    right: dict[str, list[bool]] = {"all": []}
    for verdict, wanted in zip(verdicts, expected, strict=True):
        hits = {name: getattr(verdict, name) == value for name, value in wanted.items()}
        for name, hit in hits.items():
            right.setdefault(name, []).append(hit)
        right["all"].append(all(hits.values()))
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}
