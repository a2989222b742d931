"""A tiny model of every family with random weights: real classes, real topology, built in a second, no network.

For whatever needs a base model but no skill: shapes, names, gradients, files, `finetune demo --family`. What must learn
uses the embedded demo base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from finetune.families.registry import FAMILIES
from finetune.families.twins import shapes
from finetune.families.twins.tokenizers import clip_tokenizer, t5_tokenizer
from finetune.rng import seed_libraries

RESOLUTION = 64
"""The side of a picture that suits every twin, in pixels."""
SEED = 7


@dataclass(frozen=True)
class Twin:
    """A tiny model, described.

    Attributes:
        pipeline: diffusers class.
        networks: pipeline name -> configuration, as in a skeleton.
        scheduler: diffusers class and settings.
        switches: further arguments of the pipeline's constructor.
    """

    pipeline: str
    networks: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    switches: dict[str, Any]
    unprojected: tuple[str, ...] = ()
    """Text encoders whose projection changes nothing, as SD3's first one."""


TWINS: dict[str, Callable[[], Twin]] = {
    "sd1": lambda: Twin(*shapes.sd1()),
    "sd2": lambda: Twin(*shapes.sd2()),
    "sdxl": lambda: Twin(*shapes.sdxl()),
    "sdxl_refiner": lambda: Twin(*shapes.sdxl_refiner()),
    "sd3": lambda: Twin(*shapes.sd3(), unprojected=("text_encoder",)),
    "flux": lambda: Twin(*shapes.flux()),
}
"""Family -> its tiny model; a test holds the names against FAMILIES."""


def write_twin(name: str, folder: Path, *, inpainting: bool = False, **scheduler: Any) -> Path:
    """Write the tiny model of a family as a diffusers folder; the same weights every time.

    Args:
        name: a key of TWINS.
        folder: where to; made if it is missing.
        inpainting: make its UNet an inpainting one, which also reads a mask and the masked picture.
        scheduler: settings of the noise schedule that differ, e.g. prediction_type="v_prediction".

    Returns:
        `folder`.
    """
    twin = _inpainting(name) if inpainting else TWINS[name]()
    transformers.utils.logging.disable_progress_bar()
    parts: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for part, config in twin.networks.items():
            seed_libraries(SEED, part)
            parts[part] = _network(config)
            if part in twin.unprojected:
                nn.init.eye_(parts[part].text_projection.weight)
            if part.startswith("text_encoder"):
                kind = t5_tokenizer if "T5" in config["architectures"][0] else clip_tokenizer
                parts[part.replace("text_encoder", "tokenizer")] = kind()
    settings = twin.scheduler | scheduler
    parts["scheduler"] = getattr(diffusers, settings["_class_name"]).from_config(settings)
    pipeline = getattr(diffusers, twin.pipeline)(**parts, **twin.switches)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _keep_switches(folder, twin.switches)
    return folder


def _inpainting(name: str) -> Twin:
    """The twin with a UNet of nine inputs."""
    twin, family = TWINS[name](), FAMILIES[name]
    assert family.inpainting_class is not None, f"{name} has no inpainting models"
    unet = twin.networks[family.denoiser] | {"in_channels": 9}
    return replace(twin, pipeline=family.inpainting_class, networks=twin.networks | {family.denoiser: unet})


def _network(config: dict[str, Any]) -> nn.Module:
    if "_class_name" in config:
        built: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    else:
        kind = getattr(transformers, config["architectures"][0])
        built = kind(kind.config_class(**config))
    for parameter in built.parameters():
        # keep: adaptive norms and last layers start at zero, and a twin must answer to all of its inputs.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return built


def _keep_switches(folder: Path, switches: dict[str, Any]) -> None:
    """Published folders name their switches even where the pipeline's class would not write them."""
    path = folder / "model_index.json"
    plain = {key: value for key, value in switches.items() if isinstance(value, bool)}
    index = json.loads(path.read_text()) | plain
    path.write_text(json.dumps(index, indent=2) + "\n")
