"""What a user may choose about a base model besides its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from finetune.families.base import Reading

NONE = "none"
"""In place of a text encoder: leave it out, where the family can do without."""


@dataclass(frozen=True)
class Choices:
    """What a user chose; the defaults choose nothing.

    Attributes:
        vae: an autoencoder from elsewhere: folder, hub id or single file.
        text_encoders: pipeline name -> a text encoder from elsewhere, or "none" to leave an optional one out.
        skeleton: a diffusers folder whose configurations and tokenizers describe a single file.
        prediction: what the checkpoint predicts, for one that does not say.
        zero_terminal_snr: whether its last timestep is pure noise, for one that does not say.
        reading: how prompts are read.
        storage: how the frozen denoiser's weights are held, a name in STORAGE.
    """

    vae: str | None = None
    text_encoders: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    skeleton: Path | None = None
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    reading: Reading = field(default_factory=Reading)
    storage: str = "full"
