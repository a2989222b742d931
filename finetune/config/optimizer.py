"""Fields of how the trained parameters move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.config.names import known_or_path
from finetune.config.section import Section

OptimizerName = Literal[
    "adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "ademamix8bit", "adafactor", "prodigy",
    "schedulefree_adamw", "came",
]  # fmt: skip
AnyOptimizer = Annotated[
    OptimizerName | str, known_or_path(OptimizerName, "optimizer", "any optimizer class as package.module.Class")
]


class OptimizerConfig(Section):
    """The optimizer and its learning rate."""

    name: AnyOptimizer = "adamw8bit"
    """adamw8bit keeps its state in a quarter of the memory (bitsandbytes); adamw is torch's own. prodigy chooses the
    step size itself, schedulefree_adamw needs no schedule. Any other class by import path, e.g. torch.optim.RAdam."""
    learning_rate: float = Field(default=1e-4, gt=0, le=10)
    """Step size after warm-up. LoRA: 5e-5 to 5e-4; a third to a tenth of that with lion8bit; 1 with prodigy."""
    betas: tuple[float, ...] | None = Field(default=None, min_length=1, max_length=3)
    """Decay of the running means of the gradient and of its square. None: the optimizer's own, 0.9,0.999 for AdamW."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay, per step and unit of learning rate."""
    eps: float | None = Field(default=None, gt=0)
    """Added to the denominator, so that the division stays finite. None: the optimizer's own, 1e-8 for AdamW."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer under its own names, e.g. {d_coef: 0.5} for prodigy."""
    schedule: Literal[
        "constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "rex"
    ] = "cosine"  # fmt: skip
    """The learning rate after warm-up, as a function of the step alone. wsd: constant, then a decay at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from zero."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """The same as a share of train.steps, rounded down."""
    schedule_cycles: int = Field(default=3, ge=1)
    """cosine_restarts: how often it falls from full rate to the end."""
    schedule_power: float = Field(default=2.0, gt=0)
    """polynomial: the power; 1 is linear."""
    schedule_decay: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the steps after warm-up in which it falls."""
    schedule_floor: float = Field(default=0.0, ge=0, lt=1)
    """Where falling curves end, as a share of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm, over all parameters together."""
