"""Fields of how the trained parameters move."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class OptimizerConfig(Section):
    """How the trained parameters move."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw8bit"
    """adamw8bit keeps its state in a quarter of the memory (bitsandbytes); adamw is torch's own."""
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    """Step size after warm-up. LoRA: 5e-5 to 5e-4."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay, per step and unit of learning rate."""
    eps: float = Field(default=1e-8, gt=0)
    """Keeps the division by the gradient's size finite."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """The learning rate after warm-up, as a function of the step alone."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this, over all parameters together, are scaled down to it."""
