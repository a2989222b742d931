"""Numbers from models: how likely a picture is unsafe, watermarked, ugly. Optional; needs weights from a hub or folder.

A scorer is a picture classifier (the probability of one of its labels) or a zero-shot comparison of two sentences
(the probability of the first against the second). Weights are safetensors only, and no remote code is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
)

from data_tools.errors import UsageError, shown
from data_tools.images import WHITE, Color
from data_tools.inspection import Progress
from data_tools.measuring import decode_again, in_threads
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

    name: str
    score: Score


def load_scorer(spec: ScorerSpec) -> Scorer:
    """Load the model of a scorer, on the GPU when there is one.

    Raises:
        UsageError: the model is not there, cannot be read, or does not know the label.
    """
    load = _zero_shot if spec.label is None else _classifier
    try:
        score = load(spec)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"The scorer {spec.name} cannot be loaded from {shown(spec.model)} ({reason}); give the folder of a model "
            f"with --score-model {spec.name}=FOLDER, or check the network."
        ) from error
    return Scorer(spec.name, score)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepared(model: nn.Module) -> nn.Module:
    # keep: bf16 has the range of fp32, so no model overflows; on CPUs it is slower than fp32.
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return model.to(_device(), dtype).eval().requires_grad_(False)


def _classifier(spec: ScorerSpec) -> Score:
    """The probability of one label."""
    processor = AutoImageProcessor.from_pretrained(spec.model, backend="pil", trust_remote_code=False)
    model = _prepared(
        AutoModelForImageClassification.from_pretrained(spec.model, use_safetensors=True, trust_remote_code=False)
    )
    labels: dict[str, int] = {str(name).lower(): int(index) for index, name in model.config.id2label.items()}
    wanted = (spec.label or "").lower()
    if wanted not in labels:
        raise UsageError(
            f"The model {shown(spec.model)} has no label {spec.label!r}; it has {', '.join(sorted(labels))}. "
            f"Choose one with --score-label {spec.name}=LABEL."
        )

    def score(images: Sequence[Image.Image]) -> list[float]:
        inputs = _moved(processor(images=list(images), return_tensors="pt"), model)
        # keep: softmax in fp32, because bf16 keeps three digits only.
        chances = model(**inputs).logits.float().softmax(dim=-1)
        return [float(value) for value in chances[:, labels[wanted]].tolist()]

    return score


def _zero_shot(spec: ScorerSpec) -> Score:
    """How much better a picture fits the first sentence than the second (CLIP, SigLIP and their like)."""
    processor = AutoProcessor.from_pretrained(spec.model, backend="pil", trust_remote_code=False)
    model = _prepared(AutoModel.from_pretrained(spec.model, use_safetensors=True, trust_remote_code=False))

    def score(images: Sequence[Image.Image]) -> list[float]:
        inputs = processor(text=list(spec.sentences), images=list(images), return_tensors="pt", padding=True)
        output = model(**_moved(inputs, model))
        return [float(value) for value in output.logits_per_image.float().softmax(dim=-1)[:, 0].tolist()]

    return score


def _moved(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs on the model's device, floats in its number format."""
    weight = next(model.parameters())
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


@torch.no_grad()
def score_all(
    root: Path,
    records: Sequence[ImageRecord],
    scorers: Sequence[Scorer],
    *,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """The numbers of all scorers for every picture, 0 to 1, in order.

    Raises:
        RefusedError: a picture changed since it was scanned.
    """
    scores: list[dict[str, float]] = []

    def load(record: ImageRecord) -> Image.Image:
        return reduced(decode_again(root, record, background), SIDE)

    for start in range(0, len(records), BATCH):
        images = list(in_threads(load, records[start : start + BATCH], workers))
        columns = {scorer.name: scorer.score(images) for scorer in scorers}
        scores += [{name: values[place] for name, values in columns.items()} for place in range(len(images))]
        if progress is not None:
            progress(len(scores), len(records))
    return scores
