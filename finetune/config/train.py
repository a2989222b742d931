"""Fields of the run itself: length, validation, sample sheets, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from finetune.config.section import Section
from finetune.errors import ConfigError
from finetune.prompt_lines import prompt_problems, read_prompts


class TrainConfig(Section):
    """How long to train, in what batches, and what to log."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures per process and forward pass, class pictures included."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; every picture of a step counts the same."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a running mean of the trained parameters and export that. 0.99 to 0.9999; None turns it off."""
    ema_power: float | None = Field(default=None, gt=0, le=1)
    """How fast the running mean warms up: the decay of step n is at most 1 - n^-power; 0.75 suits short runs, 0.67 long
    ones. None: at most n / (n + 9)."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw of the run."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop after this many hours since the start, loading included: save, exit with code 75, and resume with the same
    command. For Colab and spot machines. None: no limit."""
    on_spike: Literal["warn", "stop", "ignore"] = "warn"
    """When a picture's loss is far above what is usual at its noise level: warn and name it, stop, or ignore it."""
    spike_deviations: float = Field(default=8.0, gt=0)
    """How far that is, in robust standard deviations of the logarithm of the loss."""
    tolerate_nonfinite: int = Field(default=0, ge=0)
    """How many steps may have a loss or gradient that is not finite before the run stops; such a gradient counts as
    zero."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two lines in metrics.jsonl."""
    trackers: tuple[
        Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "dvclive"], ...
    ] = ("tensorboard",)
    """Experiment trackers to use besides metrics.jsonl; those that take pictures get the sample sheets. A run is named
    like its folder, in the project "finetune" or as set by e.g. WANDB_PROJECT."""


class ValidationConfig(Section):
    """A loss that can be compared: fixed pictures, fixed noise, fixed noise levels, as a ratio to the base model."""

    every: int = Field(default=100, ge=0)
    """Optimizer steps between validations; 0 turns validation off."""
    holdout: int = Field(default=0, ge=0)
    """Subject pictures held out of training for validation, near copies together. 0: validate on a fixed sample of the
    training pictures."""
    folder: Path | None = None
    """Folder of pictures that are only validated on, captioned like the training ones. None: see holdout."""
    quantiles: int = Field(default=8, ge=1)
    """Noise levels per picture, spread evenly over the range."""
    patience: int = Field(default=0, ge=0)
    """Stop early after this many validations without improvement; 0: never. With checkpoint.keep_best, the best is
    exported by `finetune export RUN --checkpoint best`."""
    min_improvement: float = Field(default=0.0, ge=0)
    """How much lower the ratio must be to count as an improvement."""


class SamplesConfig(Section):
    """Pictures rendered from fixed prompts and seeds, before the first step and after the last."""

    prompts: tuple[str, ...] = ()
    """Prompts to render, or the name of a .txt file with one prompt per line; empty turns samples off. Settings may
    follow a prompt, as in kohya's files: --n negative, --w --h pixels, --d seed, --l guidance, --s steps."""
    per_prompt: int = Field(default=2, ge=1)
    """Pictures per prompt, with seeds 0, 1, 2, ... before and after training."""
    every: int = Field(default=0, ge=0)
    """Optimizer steps between sample sheets; 0: only before and after training."""
    inference_steps: int = Field(default=25, ge=1)
    """Denoising steps per picture."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """How closely prompts are followed; 1 turns guidance off. None: the family's usual, 7.5, for Flux 3.5."""
    negative_prompt: str = ""
    """What to steer away from."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if isinstance(value, str) and not Path(value).is_file():
            raise ValueError(f"there is no such text file of prompts; prompts themselves are a list: [{value}]")
        try:
            return read_prompts(Path(value)) if isinstance(value, str) else value
        except ConfigError as error:
            raise ValueError(error.headline) from None

    @field_validator("prompts")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if problems := prompt_problems(value):
            raise ValueError("\n".join(problems))
        return value


class CheckpointConfig(Section):
    """How much work a crash may cost."""

    every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints; the last step always gets one."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept. An old one is deleted only after the new one is safe on disk."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this many steps are never deleted; 0: none."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation ratio; one is written at each new best."""
