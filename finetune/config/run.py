"""Run: the one frozen value that describes a training run, and how two runs are compared."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from finetune.config.adapter import AdapterConfig, TextAdapterConfig
from finetune.config.contradictions import contradictions
from finetune.config.data import DataConfig
from finetune.config.export import ExportConfig
from finetune.config.model import ModelConfig
from finetune.config.objective import ObjectiveConfig
from finetune.config.optimizer import OptimizerConfig
from finetune.config.section import Section
from finetune.config.tokens import TokensConfig
from finetune.config.train import CheckpointConfig, SamplesConfig, TrainConfig, ValidationConfig


class Run(Section):
    """One training run, from pictures to adapter."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig | None = AdapterConfig()
    """Adapter of the denoiser. None: it stays as it is, and words or text encoders alone are trained."""
    text_encoder_adapter: TextAdapterConfig | None = None
    """Adapter of the text encoders. None: they stay frozen and captions are encoded once."""
    tokens: TokensConfig | None = None
    """Learned words (textual inversion; with an adapter: pivotal tuning). None: no word is learned."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    output_dir: Path
    """Folder of this run: checkpoints, metrics, samples, cache, exports. Running again resumes it."""

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def trains_text(self) -> bool:
        """Whether captions must be encoded in every step, because what encodes them is trained."""
        return self.text_encoder_adapter is not None or self.tokens is not None

    def methods(self) -> dict[str, str]:
        """Section -> adapter method, of everything that is trained but words."""
        sections = {"adapter": self.adapter, "text_encoder_adapter": self.text_encoder_adapter}
        return {name: section.method for name, section in sections.items() if section is not None}

    def trigger_words(self) -> tuple[str, ...]:
        """What to write in a prompt to call what was learned."""
        trigger = (self.data.trigger,) if self.data.trigger else ()
        return tuple(dict.fromkeys([*trigger, *(self.tokens.words if self.tokens else ())]))

    def export_name(self) -> str:
        """What the exported adapter is called."""
        folder = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", self.output_dir.resolve().name)).strip("-_")
        return self.export.name or folder or "adapter"

    def digest(self) -> str:
        """SHA-256 over everything that decides the result (not where it is written, nor how often it is logged)."""
        decisive = {key: value for key, value in flatten(self).items() if not is_free(key)}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


FREE_TO_CHANGE = (
    "output_dir", "checkpoint.", "samples.", "export.", "validation.every", "validation.patience",
    "validation.min_improvement", "train.log_every", "train.trackers", "train.max_hours", "train.on_spike",
    "train.spike_deviations", "train.tolerate_nonfinite",
    "data.cache_folder", "data.prior.batch_size", "data.folder", "data.prior.folder", "validation.folder",
    "model.base", "model.revision", "model.variant",
)  # fmt: skip
"""Fields that a resumed run may change: they do not touch the trained weights. Folders and the base's name are among
them, because the content itself is compared: every picture's digest and the digest of the base's weights."""


def is_free(key: str) -> bool:
    """Whether a dotted field may change between the two halves of a resumed run."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_TO_CHANGE)


def flatten(run: BaseModel) -> dict[str, Any]:
    """Dotted field names and their JSON values, e.g. {"adapter.rank": 16}; a section that is off is one None."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, inner in value.items() for k, v in walk(f"{prefix}.{name}", inner).items()}

    document = run.model_dump(mode="json")
    return {key: value for name, inner in document.items() for key, value in walk(name, inner).items()}


def differences(old: Run, new: Run) -> list[str]:
    """What would change the training if a run made with `old` went on with `new`, one line per field."""
    before, after = flatten(old), flatten(new)
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k) and not is_free(k)]
    shares = [section.train_share for section in (old.text_encoder_adapter, old.tokens) if section is not None]
    # keep: a warm-up that is a share of the steps moves with their number.
    follows_steps = bool(old.optimizer.warmup_share) or any(share < 1 for share in shares)
    if old.optimizer.schedule == "constant" and "train.steps" in changed and not follows_steps:
        changed.remove("train.steps")
    return [f"{key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in changed]
