"""Fields of what is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class AdapterConfig(Section):
    """What is trained, and how large it is."""

    method: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the low-rank update; file size and memory grow linearly with it. 4 to 128 is usual."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength: the update is scaled by alpha / rank. None means alpha = rank, a scale of 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs zeroed in training."""
    targets: str = "attention"
    """Layers that get an adapter: a preset (attention, attention+mlp, all) or a regular expression over names."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of this adapter. None means optimizer.learning_rate."""
