"""Fields of the pictures: where they are, how they are captioned and cut, and prior preservation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class PriorConfig(Section):
    """Prior preservation: pictures of the ordinary class keep the class from turning into the subject (DreamBooth)."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Captions of class pictures, without the trigger word, e.g. "a photo of a dog". Several are used in turn."""
    folder: Path | None = None
    """Folder of class pictures; missing ones are generated with the base model. None: class_images in output_dir."""
    images: int = Field(default=100, ge=1)
    """How many class pictures there should be. 10 to 20 per subject picture is usual."""
    prior_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of a class picture's loss; a subject picture weighs 1."""
    inference_steps: int = Field(default=30, ge=1)
    """Denoising steps for each generated class picture."""
    guidance_scale: float = Field(default=7.5, ge=0)
    """Classifier-free guidance for generated class pictures; 1 turns it off."""
    batch_size: int = Field(default=4, ge=1)
    """Class pictures generated at once."""


class DataConfig(Section):
    """The pictures, their captions and how they are cut."""

    folder: Path
    """Folder of pictures; captions from .txt sidecars, metadata.jsonl, a template, or kohya `10_name` folders."""
    captions: Literal["auto", "metadata", "sidecar", "kohya", "template", "filename"] = "auto"
    """Where captions come from. auto: metadata.jsonl, else sidecars, else kohya folder names, else the template."""
    caption_template: str | None = None
    """Caption for pictures that have none, e.g. "a photo of sks dog"."""
    trigger: str | None = None
    """The word that calls the subject, e.g. sks. Must stand in every caption; travels in the exported file."""
    resolution: int | None = Field(default=None, ge=16, le=4096)
    """Side of a square training picture, in pixels; other shapes get the same area. None: the family's own."""
    upscale: bool = False
    """Enlarge pictures smaller than their bucket. Off: they get a smaller bucket instead."""
    flip: bool = False
    """Mirror every other draw of a picture, left to right. Not for faces or text."""
    repeats: int = Field(default=1, ge=1)
    """How often each subject picture is seen per epoch, on top of a kohya folder's own count."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of draws that see an empty caption, which keeps guidance working in long runs. 0.05 to 0.1 is usual."""
    background: str = Field(default="#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """Colour put behind transparent pixels, as #rrggbb."""
    cache_folder: Path | None = None
    """Where encoded pictures and captions are kept. None: cache in output_dir. Safe to share between runs."""
    prior: PriorConfig | None = None
    """Prior preservation with class pictures. None turns it off."""
