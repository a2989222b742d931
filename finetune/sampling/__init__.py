"""Pictures from a base model and an adapter, and sheets that show them side by side."""

from __future__ import annotations

from finetune.sampling.apply import adapter_applied, adapter_targets, evaluating, network
from finetune.sampling.generate import SCHEDULERS, build_pipeline, generate
from finetune.sampling.grid import Row, contact_sheet

__all__ = [
    "SCHEDULERS",
    "Row",
    "adapter_applied",
    "adapter_targets",
    "build_pipeline",
    "contact_sheet",
    "evaluating",
    "generate",
    "network",
]
