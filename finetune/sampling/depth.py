"""Depth maps out of ordinary pictures, for ControlNets that were trained on them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from PIL import Image

from data_tools.models import UNREADABLE, Source, choose_device, moved, reason_of, weights_digest
from finetune.errors import ConfigError

USUAL = "depth-anything/Depth-Anything-V2-Small-hf"
METRES = frozenset({"depth_pro", "glpn", "zoedepth"})
"""Kinds of models that answer with distances; all others answer with nearness, unless their configuration says so."""


@torch.inference_mode()
def depth_map(picture: Image.Image, place: str) -> tuple[Image.Image, str]:
    """How near everything is: white is nearest, black farthest, in grey levels between them; and the weights' SHA-256.

    Args:
        place: folder or hub id of a depth estimation model of transformers. Its own code is never run.

    Raises:
        ConfigError: if there is no such model, or it sees no depth in the picture.
        DataToolsError: if its weights are pickled or incomplete.

    Source: Ranftl et al. 2020, MiDaS, arXiv:1907.01341, whose inverse depth the published ControlNets were shown.
    """
    transformers.utils.logging.disable_progress_bar()
    source = Source(place)
    try:
        images = source.load(transformers.AutoImageProcessor, backend="pil")
        model = source.model(transformers.AutoModelForDepthEstimation, choose_device(None))
    except UNREADABLE as error:
        raise ConfigError(
            f"--depth-model {place} cannot be loaded ({reason_of(error)}); name the folder or hub id of a depth "
            "estimation model of transformers, such as Depth Anything or DPT, with its preprocessor_config.json."
        ) from None
    seen: Any = model(**moved(images(images=picture, return_tensors="pt"), model))
    found = images.post_process_depth_estimation(seen, [picture.size[::-1]])[0]["predicted_depth"].float().cpu()
    in_metres = getattr(model.config, "depth_estimation_type", None) == "metric" or model.config.model_type in METRES
    near = 1 / found.clamp(min=1e-3) if in_metres else found
    span = near.max() - near.min()
    if not bool(torch.isfinite(span)) or span == 0:
        raise ConfigError(f"{place} sees no depth in the control picture: all of it is equally near; take another.")
    levels = ((near - near.min()) / span * 255).to(torch.uint8)
    return Image.fromarray(levels.numpy()).convert("RGB"), weights_digest(model)
