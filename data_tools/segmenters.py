"""Models that find what words name in a picture, place by place.

CLIPSeg is told in words; a semantic segmentation model (SegFormer, UperNet, BEiT, DPT, ...) knows its own labels.
Sources: transformers 5.23, modules clipseg, segformer, beit; Lueddecke and Ecker 2022, arXiv:2112.10003.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoTokenizer,
    CLIPSegForImageSegmentation,
)

from data_tools.errors import UsageError, shown
from data_tools.masking import Chances, Find
from data_tools.models import UNREADABLE, Source, choose_device, moved, reason_of

SHOWN_LABELS = 30


def load(source: Source, wanted: Sequence[str], device: str | None) -> Find:
    """Load a model that finds `wanted`; where it finds several of them, all count.

    Raises:
        UsageError: no such model, one for something else, or a label that it does not know.
        DataToolsError: pickled weights, exit code 8.
    """
    where = choose_device(device)
    try:
        config = source.load(AutoConfig)
        # keep: what is cut off the picture's sides would shift everything that is found.
        images = source.load(AutoImageProcessor, backend="pil", do_center_crop=False)
        if config.model_type == "clipseg":
            return _told(source, images, wanted, where)
        model = source.model(AutoModelForSemanticSegmentation, where)
    except UNREADABLE as error:
        raise UsageError(
            f"No masks can be found with {shown(source.place)} ({reason_of(error)}); give the folder or hub id of a "
            "CLIPSeg or of a semantic segmentation model with --model, or check the network."
        ) from error
    return _knowing(model, images, wanted, source.place)


def _told(source: Source, images: Any, wanted: Sequence[str], device: torch.device) -> Find:
    """CLIPSeg: every picture is asked for every text."""
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


def _knowing(model: Any, images: Any, wanted: Sequence[str], place: str) -> Find:
    """A model with labels of its own: the likelihoods of those wanted are added up."""
    labels = {str(name).strip().lower(): int(index) for index, name in model.config.id2label.items()}
    unknown = [name for name in wanted if name.strip().lower() not in labels]
    if unknown:
        names = sorted(labels)
        more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
        raise UsageError(
            f"The model {shown(place)} has no label {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(names[:SHOWN_LABELS])}{more}. A CLIPSeg model finds what you tell it in words."
        )
    chosen = [labels[name.strip().lower()] for name in wanted]

    @torch.inference_mode()
    def find(pictures: Sequence[Image.Image]) -> list[Chances]:
        inputs = images(images=list(pictures), return_tensors="pt")
        logits = model(pixel_values=moved(inputs, model)["pixel_values"]).logits
        return _plain(logits.float().softmax(dim=1)[:, chosen].sum(dim=1))

    return find


def _plain(chances: torch.Tensor) -> list[Chances]:
    return list(chances.clamp(0, 1).cpu().numpy())
