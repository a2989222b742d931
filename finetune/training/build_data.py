"""From a `Run` to pictures, caches and batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.scan import Problem
from finetune.config import DataConfig, PriorConfig, Run
from finetune.data import prior
from finetune.data.batch import Collator
from finetune.data.cache import LatentCache, TextCache
from finetune.data.dataset import Colour, Cut, Picture, check_trigger, load_pictures, long_captions, split_holdout
from finetune.errors import ConfigError
from finetune.families import Components, Conditioning, ModelFamily
from finetune.tracking import Reporter, count_only
from finetune.training.devices import on_device


@dataclass(frozen=True)
class Pictures:
    """What a run sees.

    Attributes:
        training: subject and class pictures.
        holdout: subject pictures that are only validated on.
        problems: warnings and notes of the scan.
        generated: class pictures rendered just now.
    """

    training: list[Picture]
    holdout: list[Picture]
    problems: list[Problem]
    generated: int

    @property
    def subject(self) -> list[Picture]:
        """The subject's pictures that are trained on."""
        return [p for p in self.training if not p.is_class]

    @property
    def all(self) -> list[Picture]:
        """Everything that has to be encoded."""
        return [*self.training, *self.holdout]


def background_colour(text: str) -> Colour:
    """(red, green, blue) of "#rrggbb"."""
    return (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16))


def build_cut(data: DataConfig, family: ModelFamily, components: Components) -> Cut:
    """How pictures are cut for this base: its own resolution unless the run names one."""
    resolution = data.resolution or family.native_resolution(components)
    multiple = family.bucket_multiple if resolution > family.bucket_multiple * 4 else smallest_multiple(components)
    if resolution % multiple:
        raise ConfigError(
            f"data.resolution={resolution} is no multiple of {multiple} pixels, in which {family.name} buckets grow; "
            f"use {resolution // multiple * multiple} or {(resolution // multiple + 1) * multiple}."
        )
    return Cut(resolution, multiple, data.upscale, background_colour(data.background))


def smallest_multiple(components: Components) -> int:
    """What picture sides must be divisible by so that autoencoder and denoiser halve evenly, in pixels."""
    assert components.vae is not None, "the autoencoder is loaded with the base and dropped after caching"
    halvings = len(components.vae.config.block_out_channels) + len(components.denoiser.config.block_out_channels) - 2
    return int(2**halvings)


def build_pictures(data: DataConfig, cut: Cut, holdout: int, seed: int, reporter: Reporter) -> Pictures:
    """Scan the subject's folder and set held-out pictures aside."""
    with reporter.progress("Checking pictures", 1) as advance:
        subject, problems = load_pictures(
            data.folder, cut, captions=data.captions, template=data.caption_template, repeats=data.repeats
        )
        advance(1, "")
    check_trigger(subject, data.trigger)
    training, held = split_holdout(subject, holdout, seed)
    return Pictures(training, held, problems, 0)


def add_class_pictures(
    pictures: Pictures, config: PriorConfig, folder: Path, cut: Cut, family: ModelFamily, components: Components,
    device: torch.device, reporter: Reporter,
) -> Pictures:  # fmt: skip
    """Fill the class folder with the base model, on `device`, and add its pictures to the training ones.

    They are rendered in the sizes of the subject's buckets, so that both share batches.
    """
    sizes = [p.placement.bucket for p in pictures.training]
    with on_device(list(components.modules().values()), device):
        generated = prior.fill(folder, config, family, components, sizes, reporter)
    # keep: braces are placeholders in templates and plain characters in prompts.
    prompt = config.prompts[0].replace("{", "{{").replace("}", "}}")
    others, problems = load_pictures(
        folder, cut, template=prompt, loss_weight=config.prior_loss_weight, is_class=True
    )
    warnings = [p for p in problems if p.severity == "warning"]
    training = [*pictures.training, *prior.chosen(others, config.images)]
    return Pictures(training, pictures.holdout, [*pictures.problems, *warnings], generated)


def build_collator(
    run: Run, pictures: Pictures, cut: Cut, family: ModelFamily, components: Components, device: torch.device,
    reporter: Reporter,
) -> Collator:  # fmt: skip
    """Encode every picture and, with frozen text encoders, every caption; what is on disk already is reused.
    """
    folder = run.data.cache_folder or run.output_dir / "cache"
    vae = components.vae
    assert vae is not None, "the autoencoder is loaded with the base"
    latents = LatentCache(folder, components.digests["vae"], cut.background)

    @torch.no_grad()
    def encode(pixels: Tensor):  # type: ignore[no-untyped-def]
        return family.encode_images(vae, pixels.to(device))

    copies = 2 if run.data.flip else 1
    with reporter.progress("Encoding pictures", len(pictures.all) * copies) as advance, on_device([vae], device):
        latents.prepare(
            # keep: fp32 activations of one 1024 px picture take gigabytes on a GPU.
            pictures.all, flip=run.data.flip, encode=encode, batch_size=8 if device.type == "cpu" else 2,
            progress=count_only(advance),
        )  # fmt: skip
    for path in latents.damaged:
        reporter.warn(f"{path.name} in the cache was damaged and is encoded again")
    tokenize = partial(family.tokenize, components.tokenizers)
    collator = Collator(
        pictures.training, latents, tokenize,
        seed=run.train.seed, flip=run.data.flip, caption_dropout=run.data.caption_dropout,
    )  # fmt: skip
    for line in long_captions(pictures.all, components.tokenizers):
        reporter.warn(line)
    if run.text_encoder_adapter is not None:
        return collator
    captions = [*collator.captions(), *(c for p in pictures.holdout for c in p.captions)]
    cache = TextCache(folder, text_digest(components))
    encoders = list(components.text_encoders.values())
    with reporter.progress("Encoding captions", len(set(captions))) as advance, on_device(encoders, device):
        cache.prepare(
            captions, describe=partial(_describe, family, components, device), batch_size=32,
            progress=count_only(advance),
        )  # fmt: skip
    return collator.with_text(cache)


@torch.no_grad()
def _describe(family: ModelFamily, components: Components, device: torch.device, captions: list[str]) -> Conditioning:
    tokens = {name: ids.to(device) for name, ids in family.tokenize(components.tokenizers, captions).items()}
    return family.encode_prompts(components.text_encoders, tokens)


def text_digest(components: Components) -> str:
    """One digest over all text encoders and their number format."""
    parts = [f"{name} {components.digests[name]} {_dtype(m)}" for name, m in sorted(components.text_encoders.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
