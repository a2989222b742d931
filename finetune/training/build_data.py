"""From a `Run` to pictures, caches and batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.images import SUFFIXES
from data_tools.names import suffix
from data_tools.scan import Problem
from data_tools.shelves import Shelf, distinct
from finetune.config import DataConfig, PriorConfig, Run
from finetune.data import prior
from finetune.data.batch import Collator, Variation
from finetune.data.cache import Encode, Filling, LatentCache, MaskCache, TextCache
from finetune.data.captions import CaptionRules, varies
from finetune.data.dataset import (
    Colour,
    Cut,
    Picture,
    Reading,
    check_trigger,
    load_pictures,
    long_captions,
    shelf,
)
from finetune.data.folder import check_folder
from finetune.data.holes import HoleCache
from finetune.data.pixels import to_values
from finetune.data.split import overlap, split_holdout
from finetune.data.store import Store
from finetune.data.training_size import training_size
from finetune.data.views import Augment, View
from finetune.devices import on_device
from finetune.errors import DataError
from finetune.families import Components, Conditioning, Latents, ModelFamily
from finetune.tracking import Reporter, count_only
from finetune.training.build import noise_shape

ENCODED_AT_ONCE = 8
"""Pictures per pass of the autoencoder at most; halved by itself where memory does not suffice."""
ENCODED_PIXELS = 2**20
"""Pixels of such a pass: with them SD's autoencoder holds 2.5 GiB of activations in fp32, so caching needs no more
memory than training does."""
CAPTIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Pictures:
    """What a run sees.

    Attributes:
        training: subject and class pictures.
        holdout: subject pictures that are only validated on: set aside, or from validation.folder.
        problems: warnings and notes of the scan and of the split.
        generated: class pictures rendered just now.
        origins: what rendered class pictures count as; see `prior.origins`.
    """

    training: Sequence[Picture]
    holdout: Sequence[Picture]
    problems: list[Problem]
    generated: int
    origins: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def subject(self) -> Sequence[Picture]:
        """The subject's pictures that are trained on."""
        return shelf(p for p in self.training if not p.is_class)

    @property
    def all(self) -> Iterator[Picture]:
        """Everything that has to be encoded."""
        return chain(self.training, self.holdout)


def background_colour(text: str) -> Colour:
    """(red, green, blue) of "#rrggbb"."""
    return (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16))


def build_cut(data: DataConfig, family: ModelFamily, components: Components) -> Cut:
    """How pictures are cut for this base: its own resolution unless the run names one."""
    resolution, multiple = training_size(family, components, data.resolution)
    holes = family.repaints(components.denoiser.config)
    return Cut(resolution, multiple, data.upscale, background_colour(data.background), holes)


def build_pictures(run: Run, cut: Cut, reporter: Reporter) -> Pictures:
    """Scan the subject's folder, and set held-out pictures aside or read them from validation.folder."""
    data = run.data
    reading = Reading(
        data.captions, data.caption_template, data.repeats,
        class_weight=data.prior.prior_loss_weight if data.prior else 1.0, mask=data.mask,
    )  # fmt: skip
    pictures, problems = _scanned("data.folder", data.folder, cut, reading, reporter)
    check_trigger(pictures, caption_rules(data), data.caption_variants)
    check_words(pictures, list(run.tokens.words) if run.tokens else [])
    if run.validation.folder is None:
        training, held, more = split_holdout(pictures, run.validation.holdout, run.train.seed)
        return Pictures(training, held, [*problems, *more], 0)
    held, more = _scanned("validation.folder", run.validation.folder, cut, reading, reporter)
    check_trigger(held, caption_rules(data), data.caption_variants)
    # keep: a picture of the same name is trained on; questions about it are keyed apart.
    held = shelf(replace(p, key=f"validation/{p.key}") for p in held if not p.is_class)
    return Pictures(pictures, held, [*problems, *more, *overlap(pictures, held)], 0)


def check_words(pictures: Iterable[Picture], words: list[str]) -> None:
    """Every learned word must stand in a caption of the subject, or nothing would teach it.

    Raises:
        DataError: naming each word that no caption holds.
    """
    first, missing = None, words
    for caption in (caption for p in (pictures if words else ()) if not p.is_class for caption in p.captions):
        first = caption if first is None else first
        missing = [word for word in missing if word not in caption]
    problems = [
        f"no caption holds {word}; the first is {first!r}: write the word where the subject is, e.g. with "
        f'data.captions=template and data.caption_template="a photo of {word}"'
        for word in missing
        if first is not None
    ]
    if problems:
        raise DataError("Some words of tokens.words would not be learned:", problems)


def _scanned(
    field: str, folder: Path, cut: Cut, reading: Reading, reporter: Reporter
) -> tuple[Shelf[Picture], list[Problem]]:
    check_folder(field, folder)
    total = sum(suffix(name) in SUFFIXES for _, _, names in os.walk(folder) for name in names)
    with reporter.progress(f"Checking {field}", total) as advance:
        return load_pictures(folder, cut, reading, progress=count_only(advance))


def caption_rules(data: DataConfig) -> CaptionRules:
    """How subject captions vary."""
    return CaptionRules(
        shuffle=data.shuffle_caption,
        separator=data.caption_separator,
        keep_tokens=data.keep_tokens,
        keep_separator=data.keep_tokens_separator,
        tag_dropout=data.tag_dropout,
        prefix=data.caption_prefix,
        suffix=data.caption_suffix,
        trigger=data.trigger,
    )


def variation(run: Run, cut: Cut) -> Variation:
    """What differs from draw to draw."""
    data = run.data
    return Variation(
        augment=Augment(data.flip, data.crop == "random", data.color_jitter, cut.holes, data.versions),
        rules=caption_rules(data),
        caption_variants=data.caption_variants,
        caption_dropout=data.caption_dropout,
        unmasked_weight=data.unmasked_weight,
        noise=noise_shape(run),
    )


def variation_rows(run: Run, cut: Cut, pictures: Pictures) -> list[tuple[str, str]]:
    """What differs from draw to draw, for the plan; nothing where nothing does."""
    data, varied = run.data, variation(run, cut)
    shown = [f"{varied.augment.count()} versions of each picture"] if varied.augment.count() > 1 else []
    shown += ["cropped anywhere"] if data.crop == "random" else []
    shown += [f"colours changed by up to {data.color_jitter:.0%}"] if data.color_jitter else []
    shown += ["mirrored every other time"] if data.flip else []
    shown += ["a part hidden in each, all of it in one of four"] if cut.holes else []
    said = ["tags shuffled"] if data.shuffle_caption else []
    said += [f"{data.tag_dropout:.0%} of tags dropped"] if data.tag_dropout else []
    said += [f"{data.caption_dropout:.0%} empty"] if data.caption_dropout else []
    if any(varies(p.captions, varied.rules) for p in pictures.subject):
        said.append(
            "new in every draw, for the text encoder is trained" if run.text_encoder_adapter is not None
            else f"up to {data.caption_variants} texts per caption, encoded once, for the text encoders are frozen"
        )  # fmt: skip
    masked = sum(p.mask is not None for p in pictures.training)
    masks = f"{masked} of {len(pictures.training)} pictures; outside counts {data.unmasked_weight:g}"
    rows = (("Pictures vary", ", ".join(shown)), ("Captions vary", ", ".join(said)), ("Masks", masks if masked else ""))
    return [(label, value) for label, value in rows if value]


def add_class_pictures(
    pictures: Pictures, config: PriorConfig, folder: Path, cut: Cut, family: ModelFamily, components: Components,
    device: torch.device, reporter: Reporter,
) -> Pictures:  # fmt: skip
    """Fill the class folder with the base model, on `device`, and add its pictures to the training ones.

    They are rendered in the sizes of the subject's buckets, so that both share batches. Class pictures among the
    subject's own rows count towards the number that is wanted.
    """
    own = [p for p in pictures.training if p.is_class]
    sizes = [p.placement.bucket for p in pictures.subject]
    with on_device(components.drawing(), device):
        generated = prior.fill(folder, config, family, components, sizes, reporter, have=len(own))
    if own and not prior.has_pictures(folder):
        return replace(pictures, generated=generated)
    # keep: braces are placeholders in templates and plain characters in prompts.
    prompt = config.prompts[0].replace("{", "{{").replace("}", "}}")
    reading = Reading(template=prompt, class_weight=config.prior_loss_weight, is_class=True, mask="off")
    others, problems = load_pictures(folder, cut, reading)
    warnings = [p for p in problems if p.severity == "warning"]
    training = shelf(chain(pictures.training, prior.chosen(others, config.images - len(own))))
    noted = [*pictures.problems, *warnings]
    return Pictures(training, pictures.holdout, noted, generated, prior.origins(folder))


def build_collator(
    run: Run, pictures: Pictures, cut: Cut, family: ModelFamily, components: Components, device: torch.device,
    reporter: Reporter,
) -> Collator:  # fmt: skip
    """Encode every picture and, with frozen text encoders, every caption; what is on disk already is reused.

    Any number of processes may call this at once; they share the work through the cache folder.
    """
    folder = run.data.cache_folder or run.output_dir / "cache"
    vae = components.vae
    assert vae is not None, "the autoencoder is loaded with the base"
    vae_digest = f"{components.digests['vae']} {_dtype(vae)}"
    latents = LatentCache(folder, vae_digest, cut.background)
    masks = MaskCache(folder, family.vae_stride(vae)) if any(p.mask for p in pictures.all) else None
    holes = HoleCache(folder, vae_digest, cut.background) if cut.holes else None
    collator = Collator(
        pictures.training, latents, partial(family.tokenize, components.tokenizers), variation(run, cut),
        seed=run.train.seed, masks=masks, holes=holes,
    )  # fmt: skip
    views = collator.views(pictures.holdout)
    if masks is not None:
        _prepare_masks(masks, views, run.data.unmasked_weight, reporter)
    with on_device([vae], device):
        encode = partial(_encode, family, vae, device)
        _fill_latents(latents, views, lambda seen: encode(to_values(seen.to(device))), "Encoding pictures", reporter)
        if holes is not None:
            _fill_latents(holes, views, encode, "Encoding pictures with holes", reporter)
    room = {name: family.token_limit(name, tokenizer) for name, tokenizer in components.tokenizers.items()}
    for line in long_captions(pictures.all, components.tokenizers, room):
        reporter.warn(line)
    if run.trains_text():
        return collator
    prompts = run.objective.teacher.prompts if run.objective.teacher is not None else ()
    texts = chain(collator.captions(), (collator.caption_of(p) for p in pictures.holdout), prompts)
    return collator.with_text(_encode_captions(folder, Shelf(distinct(texts)), family, components, device, reporter))


@torch.no_grad()
def _encode(family: ModelFamily, vae: nn.Module, device: torch.device, values: Tensor) -> Latents:
    """Latents of pixel values in [-1, 1]."""
    return family.encode_images(vae, values.to(device))


def encoded_at_once(area: int) -> int:
    """Pictures per pass of the autoencoder, where the largest has `area` pixels."""
    return max(1, min(ENCODED_AT_ONCE, ENCODED_PIXELS // area))


def _fill_latents(
    cache: LatentCache | HoleCache, views: Sequence[View], encode: Encode, what: str, reporter: Reporter
) -> None:
    with reporter.progress(what, len(views)) as advance:
        largest = max((view.placement.bucket[0] * view.placement.bucket[1] for view in views), default=1)
        cache.prepare(views, encode, Filling(encoded_at_once(largest), count_only(advance), reporter.warn))
    _tell_damage(cache.store, reporter)


def _prepare_masks(masks: MaskCache, views: Sequence[View], unmasked_weight: float, reporter: Reporter) -> None:
    with reporter.progress("Preparing masks", len(views)) as advance:
        masks.prepare(views, Filling(64, count_only(advance), reporter.warn), may_be_empty=unmasked_weight > 0)
    _tell_damage(masks.store, reporter)
    bare = sorted({view.picture.path.name for view in views if view.picture.mask is None and not view.picture.is_class})
    if bare:
        named = ", ".join(bare[:5]) + (f" and {len(bare) - 5} more" if len(bare) > 5 else "")
        reporter.warn(f"no mask for {named}: their loss counts everywhere")


def _encode_captions(
    folder: Path, texts: Sequence[str], family: ModelFamily, components: Components, device: torch.device,
    reporter: Reporter,
) -> TextCache:  # fmt: skip
    cache = TextCache(folder, text_digest(family, components), partial(family.tokenize, components.tokenizers))
    encoders = list(components.text_encoders.values())
    with reporter.progress("Encoding captions", len(texts)) as advance, on_device(encoders, device):
        filling = Filling(CAPTIONS_AT_ONCE, count_only(advance), reporter.warn)
        cache.prepare(texts, partial(_describe, family, components, device), filling)
    _tell_damage(cache.store, reporter)
    return cache


def _tell_damage(store: Store, reporter: Reporter) -> None:
    for path in store.set_aside:
        reporter.warn(
            f"{path.name} in {path.parent} was damaged; it is set aside and its content is encoded again "
            f"(finetune cache {path.parent.parent} --prune removes it)"
        )


@torch.no_grad()
def _describe(
    family: ModelFamily, components: Components, device: torch.device, tokens: dict[str, Tensor]
) -> Conditioning:
    return family.encode_prompts(components.text_encoders, {name: ids.to(device) for name, ids in tokens.items()})


def text_digest(family: ModelFamily, components: Components) -> str:
    """One digest over all text encoders, their number format, and how the family reads them."""
    parts = [f"{name} {components.digests[name]} {_dtype(m)}" for name, m in sorted(components.text_encoders.items())]
    return hashlib.sha256("\n".join([*parts, repr(family.reading)]).encode()).hexdigest()


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
