"""Numbers from models: how likely a picture is unsafe, watermarked, ugly. Optional; needs weights from a hub or folder.

A scorer is a picture classifier (the probability of one of its labels) or a zero-shot comparison of two sentences
(the probability of the first against the second). Weights are safetensors only, and no remote code is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor

from data_tools.errors import UsageError, shown
from data_tools.images import DECODER, WHITE, Color, color_name
from data_tools.inspection import Progress
from data_tools.measuring import decode_again, numbers_of
from data_tools.memory import Numbers
from data_tools.models import UNREADABLE, Source, choose_device, moved, reason_of, weights_digest
from data_tools.pool import in_threads
from data_tools.processes import ALONE, Share
from data_tools.quality import reduced
from data_tools.records import ImageRecord
from data_tools.scoring import ScorerSpec

BATCH = 16
SIDE = 512
"""Pictures are reduced to this before the model's own resize; models read 224 to 448 pixels."""
Score = Callable[[Sequence[Image.Image]], list[float]]


@dataclass(frozen=True)
class Scorer:
    """A loaded model and what is asked of it."""

    spec: ScorerSpec
    weights: str
    """Digest of the model's weights."""
    score: Score


def load_scorer(spec: ScorerSpec) -> Scorer:
    """Load the model of a scorer, on this process's GPU when there is one.

    Raises:
        UsageError: the model is not there, cannot be read, or does not know the label.
        DataToolsError: pickled weights, exit code 8.
    """
    load = _zero_shot if spec.label is None else _classifier
    try:
        model, score = load(spec, Source(spec.model))
    except UNREADABLE as error:
        raise UsageError(
            f"The scorer {spec.name} cannot be loaded from {shown(spec.model)} ({reason_of(error)}); give the folder "
            f"of a model with --score-model {spec.name}=FOLDER, or check the network."
        ) from error
    return Scorer(spec, weights_digest(model), score)


def _classifier(spec: ScorerSpec, source: Source) -> tuple[Any, Score]:
    """The probability of one label."""
    processor = source.load(AutoImageProcessor, backend="pil")
    model = source.model(AutoModelForImageClassification, choose_device(None))
    labels: dict[str, int] = {str(name).lower(): int(index) for index, name in model.config.id2label.items()}
    wanted = (spec.label or "").lower()
    if wanted not in labels:
        raise UsageError(
            f"The model {shown(spec.model)} has no label {spec.label!r}; it has {', '.join(sorted(labels))}. "
            f"Choose one with --score-label {spec.name}=LABEL."
        )

    def score(images: Sequence[Image.Image]) -> list[float]:
        inputs = moved(processor(images=list(images), return_tensors="pt"), model)
        # keep: softmax in fp32, because bf16 keeps three digits only.
        chances = model(**inputs).logits.float().softmax(dim=-1)
        return [float(value) for value in chances[:, labels[wanted]].tolist()]

    return model, score


def _zero_shot(spec: ScorerSpec, source: Source) -> tuple[Any, Score]:
    """How much better a picture fits the first sentence than the second (CLIP, SigLIP and their like)."""
    processor = source.load(AutoProcessor, backend="pil")
    model = source.model(AutoModel, choose_device(None))

    def score(images: Sequence[Image.Image]) -> list[float]:
        inputs = processor(text=list(spec.sentences), images=list(images), return_tensors="pt", padding=True)
        output = model(**moved(inputs, model))
        return [float(value) for value in output.logits_per_image.float().softmax(dim=-1)[:, 0].tolist()]

    return model, score


def score_all(
    root: Path,
    records: Sequence[ImageRecord],
    scorers: Sequence[Scorer],
    *,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> list[dict[str, float]]:
    """The numbers of all scorers for every picture, 0 to 1, in order.

    They are remembered batch by batch under the digests of picture and weights, so that a killed run goes on.

    Raises:
        RefusedError: a picture changed since it was scanned.
    """
    asked = [f"{each.weights} {each.spec.label} {each.spec.sentences}" for each in scorers]
    key = "\n".join([color_name(background), DECODER, *asked])

    def load(record: ImageRecord) -> Image.Image:
        return reduced(decode_again(root, record, background), SIDE)

    @torch.no_grad()
    def count(missing: Sequence[ImageRecord]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(missing), BATCH):
            images = list(in_threads(load, missing[start : start + BATCH], workers))
            columns = [scorer.score(images) for scorer in scorers]
            for values in zip(*columns, strict=True):
                yield {scorer.spec.name: value for scorer, value in zip(scorers, values, strict=True)}

    return numbers_of(records, Numbers("scores", key, share), count, progress)
