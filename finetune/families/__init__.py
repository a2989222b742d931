"""Base models. The only package that knows a family's name; to add one, write its file and name it in FAMILIES.

What needs torch is loaded on first use, so that a file's header can be read and judged without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.families.base import Components, Conditioning, Latents, ModelFamily, Reading, SizeConditioning
    from finetune.families.choices import Choices
    from finetune.families.detect import Detection, detect_family
    from finetune.families.registry import FAMILIES, denoiser_config, load_family, load_model, network_configs, outline

_ON_DEMAND = {
    "FAMILIES": "finetune.families.registry",
    "Choices": "finetune.families.choices",
    "Components": "finetune.families.base",
    "Conditioning": "finetune.families.base",
    "Detection": "finetune.families.detect",
    "Latents": "finetune.families.base",
    "ModelFamily": "finetune.families.base",
    "Reading": "finetune.families.base",
    "SizeConditioning": "finetune.families.base",
    "denoiser_config": "finetune.families.registry",
    "detect_family": "finetune.families.detect",
    "load_family": "finetune.families.registry",
    "load_model": "finetune.families.registry",
    "network_configs": "finetune.families.registry",
    "outline": "finetune.families.registry",
}
"""Public name -> the module that defines it."""

__all__ = [
    "FAMILIES",
    "Choices",
    "Components",
    "Conditioning",
    "Detection",
    "Latents",
    "ModelFamily",
    "Reading",
    "SizeConditioning",
    "denoiser_config",
    "detect_family",
    "load_family",
    "load_model",
    "network_configs",
    "outline",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the table above."""
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'finetune.families' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)
