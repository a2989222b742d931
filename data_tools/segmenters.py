"""Models that find what words name in a picture: place by place, or as boxes.

CLIPSeg, OWL-ViT, OWLv2 and Grounding DINO are told in words; semantic segmentation (SegFormer, UperNet, BEiT, DPT, ...)
and object detection (DETR, YOLOS, RT-DETR, D-FINE, ..., for persons or faces) know labels of their own.
Sources: transformers 5.23, modules clipseg, segformer, detr, yolos, rt_detr, owlv2, grounding_dino; Lueddecke and Ecker
2022, arXiv:2112.10003.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    AutoTokenizer,
    CLIPSegForImageSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from data_tools.errors import UsageError, shown
from data_tools.masking import Chances, Find
from data_tools.models import UNREADABLE, Source, choose_device, moved, reason_of

SHOWN_LABELS = 30
GRID = 256
"""Places along the longer side of a picture into which boxes are drawn."""
UNLIKELY = 0.01
"""Boxes below this are not looked at."""


@dataclass(frozen=True)
class Finder:
    """A model that knows what it is to look for."""

    find: Find
    threshold: float
    """The likelihood from which what it finds is usually meant."""


def load(source: Source, wanted: Sequence[str], device: str | None) -> Finder:
    """Load a model that finds `wanted`; where it finds several of them, all count.

    Raises:
        UsageError: no such model, one for something else, or a label that it does not know.
        DataToolsError: pickled weights, exit code 8.
    """
    where = choose_device(device)
    try:
        kind = str(source.load(AutoConfig).model_type)
        if kind in TOLD:
            prepare, threshold = TOLD[kind]
            return Finder(prepare(source, wanted, where), threshold)
        boxes = kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
        return Finder((_boxes_of_labels if boxes else _places_of_labels)(source, wanted, where), 0.5)
    except UNREADABLE as error:
        raise UsageError(
            f"No masks can be found with {shown(source.place)} ({reason_of(error)}); give the folder or hub id of a "
            "CLIPSeg, semantic segmentation or object detection model with --model, or check the network."
        ) from error


def _places_of_texts(source: Source, wanted: Sequence[str], device: torch.device) -> Find:
    """CLIPSeg: every picture is asked for every text."""
    images = _images(source)
    model = source.model(CLIPSegForImageSegmentation, device)
    texts = source.load(AutoTokenizer)(list(wanted), padding=True, return_tensors="pt")

    @torch.inference_mode()
    def find(pictures: Sequence[Image.Image]) -> list[Chances]:
        pixels = moved(images(images=list(pictures), return_tensors="pt"), model)["pixel_values"]
        columns = []
        for number in range(len(wanted)):
            text = {name: values[number : number + 1].expand(len(pictures), -1) for name, values in texts.items()}
            logits = model(**moved(text, model), pixel_values=pixels).logits
            columns.append(logits.float().reshape(len(pictures), *logits.shape[-2:]).sigmoid())
        return _plain(torch.stack(columns).amax(dim=0))

    return find


def _places_of_labels(source: Source, wanted: Sequence[str], device: torch.device) -> Find:
    """Semantic segmentation: the likelihoods of the labels that are wanted are added up."""
    images = _images(source)
    model = source.model(AutoModelForSemanticSegmentation, device)
    chosen = _labels(model, wanted, source.place)

    @torch.inference_mode()
    def find(pictures: Sequence[Image.Image]) -> list[Chances]:
        inputs = images(images=list(pictures), return_tensors="pt")
        logits = model(pixel_values=moved(inputs, model)["pixel_values"]).logits
        return _plain(logits.float().softmax(dim=1)[:, chosen].sum(dim=1))

    return find


def _boxes_of_labels(source: Source, wanted: Sequence[str], device: torch.device) -> Find:
    """Object detection: the boxes of the labels that are wanted."""
    images = source.load(AutoImageProcessor, backend="pil")
    model = source.model(AutoModelForObjectDetection, device)
    chosen = set(_labels(model, wanted, source.place))

    @torch.inference_mode()
    def find(picture: Image.Image) -> Chances:
        output = model(**moved(images(images=[picture], return_tensors="pt"), model))
        found = images.post_process_object_detection(output, UNLIKELY, [picture.size[::-1]])[0]
        mine = [place for place, label in enumerate(found["labels"].tolist()) if label in chosen]
        return _drawn(picture.size, found["boxes"][mine], found["scores"][mine])

    return _one_by_one(find)


def _boxes_of_texts(source: Source, wanted: Sequence[str], device: torch.device) -> Find:
    """Detection of what words name: the boxes of all texts."""
    processor = source.load(AutoProcessor, backend="pil")
    try:
        # keep: now, because what a processor lacks it only misses when it is used.
        processor(text=[list(wanted)], images=[Image.new("RGB", (64, 64))], return_tensors="pt", padding=True)
    except ImportError as error:
        raise UsageError(f"{shown(source.place)} needs SciPy; pip install 'finetune[owlv2]'.") from error
    model = source.model(AutoModelForZeroShotObjectDetection, device)

    @torch.inference_mode()
    def find(picture: Image.Image) -> Chances:
        inputs = processor(text=[list(wanted)], images=[picture], return_tensors="pt", padding=True)
        found = processor.post_process_grounded_object_detection(
            model(**moved(inputs, model)), threshold=UNLIKELY, target_sizes=[picture.size[::-1]]
        )[0]
        return _drawn(picture.size, found["boxes"], found["scores"])

    return _one_by_one(find)


TOLD: dict[str, tuple[Callable[[Source, Sequence[str], torch.device], Find], float]] = {
    "clipseg": (_places_of_texts, 0.5),
    "owlvit": (_boxes_of_texts, 0.1),
    "owlv2": (_boxes_of_texts, 0.2),
    "grounding-dino": (_boxes_of_texts, 0.3),
    "mm-grounding-dino": (_boxes_of_texts, 0.3),
}
"""Kinds of models that are told what to find, by `model_type`, and their usual thresholds (model cards)."""


def _images(source: Source) -> Any:
    # keep: what is cut off the picture's sides would shift everything that is found.
    return source.load(AutoImageProcessor, backend="pil", do_center_crop=False)


def _labels(model: Any, wanted: Sequence[str], place: str) -> list[int]:
    """The numbers of the model's labels that are wanted.

    Raises:
        UsageError: it does not know one of them.
    """
    labels = {str(name).strip().lower(): int(index) for index, name in model.config.id2label.items()}
    unknown = [name for name in wanted if name.strip().lower() not in labels]
    if unknown:
        names = sorted(labels)
        more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
        raise UsageError(
            f"The model {shown(place)} has no label {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(names[:SHOWN_LABELS])}{more}. A CLIPSeg model finds what you tell it in words."
        )
    return [labels[name.strip().lower()] for name in wanted]


def _one_by_one(find: Callable[[Image.Image], Chances]) -> Find:
    """Detectors see each picture in its own shape; in a batch it would be padded, and its boxes would change."""
    return lambda pictures: [find(picture) for picture in pictures]


def _drawn(size: tuple[int, int], boxes: torch.Tensor, chances: torch.Tensor) -> Chances:
    """Boxes (n, 4) of left, top, right, bottom in pixels of a picture of `size` (width, height) -> places."""
    scale = GRID / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    places = np.zeros((height, width), np.float32)
    for (left, top, right, bottom), chance in zip(boxes.float().tolist(), chances.float().tolist(), strict=True):
        rows = slice(max(0, math.floor(top * scale)), max(0, math.ceil(bottom * scale)))
        columns = slice(max(0, math.floor(left * scale)), max(0, math.ceil(right * scale)))
        places[rows, columns] = np.maximum(places[rows, columns], chance)
    return places


def _plain(chances: torch.Tensor) -> list[Chances]:
    return list(chances.clamp(0, 1).cpu().numpy())
