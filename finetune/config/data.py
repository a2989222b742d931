"""Fields of the pictures: where they are, how they are captioned, cut and varied, and prior preservation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class PriorConfig(Section):
    """Prior preservation: pictures of the ordinary class keep the class from turning into the subject (DreamBooth)."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Captions of class pictures, without the trigger word, e.g. "a photo of a dog". Several are used in turn, and a
    picture keeps the prompt it was rendered with. Your own class pictures keep their captions; those without any get
    the first prompt."""
    folder: Path | None = None
    """Folder of class pictures; missing ones are generated with the base model. None: class_images in output_dir."""
    images: int = Field(default=100, ge=1)
    """How many class pictures there should be. 10 to 20 per subject picture is usual."""
    prior_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of a class picture's loss; a subject picture weighs 1."""
    inference_steps: int = Field(default=30, ge=1)
    """Denoising steps for each generated class picture."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Guidance for generated class pictures; 1 turns it off. None: the family's usual, 7.5, for Flux 3.5."""
    batch_size: int = Field(default=4, ge=1)
    """Class pictures generated at once."""


class DataConfig(Section):
    """The pictures, their captions, how they are cut, and what varies from draw to draw."""

    folder: Path
    """Folder of pictures; captions from .txt sidecars, metadata.jsonl, a template, or kohya `10_name` folders."""
    captions: Literal["auto", "metadata", "sidecar", "kohya", "template", "filename"] = "auto"
    """Where captions come from. auto: metadata.jsonl, else sidecars, else kohya folder names, else the template."""
    caption_template: str | None = None
    """Caption for pictures that have none, e.g. "a photo of sks dog"."""
    trigger: str | None = None
    """The word that calls the subject, e.g. sks. It must be in every caption and is written into exported files.
    [trigger] in a caption is replaced by it."""
    caption_prefix: str = ""
    """Put before every subject caption, with a space between."""
    caption_suffix: str = ""
    """Put behind every subject caption, with a space between."""
    shuffle_caption: bool = False
    """Shuffle the tags of a subject caption in every draw. For lists of tags, not for sentences."""
    caption_separator: str = Field(default=",", min_length=1)
    """Separator between tags."""
    keep_tokens: int = Field(default=0, ge=0)
    """How many tags at the beginning are neither shuffled nor dropped."""
    keep_tokens_separator: str = Field(default="|||", min_length=1)
    """Where it stands in a caption, it decides instead: "kept ||| shuffled" or "kept ||| shuffled ||| kept"."""
    tag_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of tags that are left out of a draw's caption; kept tags and the one with the trigger never are."""
    caption_variants: int = Field(default=16, ge=1, le=10000)
    """Frozen text encoders read every caption once, beforehand: how many texts each may become by shuffling, dropping
    tags and {red|blue} choices. A trained text encoder reads a new one in every draw."""
    resolution: int | None = Field(default=None, ge=16, le=4096, multiple_of=8)
    """Side of a square training picture, in pixels; other shapes get the same area. None: the family's own."""
    upscale: bool = False
    """Enlarge pictures smaller than their bucket. Off: they get a smaller bucket instead."""
    flip: bool = False
    """Mirror every other draw of a picture, left to right. Not for faces or text."""
    crop: Literal["center", "random"] = "center"
    """Where a picture is cut that does not fit its bucket: the middle (or the focus of its row), or anywhere. Rows that
    zoom to their focus (`finetune data clean --zoom`) stay there."""
    color_jitter: float = Field(default=0.0, ge=0, le=0.5)
    """Largest random change of brightness, contrast and saturation, as a share; 0.1 is strong enough for most."""
    versions: int = Field(default=4, ge=2, le=1000)
    """Versions of each picture with crop=random, color_jitter or an inpainting base (each version hides another part),
    the plain one included: each is encoded once and a draw picks one, so that encoding stays outside of the training.
    Unused without these."""
    mask: Literal["auto", "alpha", "off"] = "auto"
    """Where a picture's loss counts. auto: masks from masks/NAME, NAME-masklabel or the column mask_file_name, where
    there are any (white counts, black does not); alpha: where the picture is opaque; off: everywhere."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """Loss weight outside a mask; 0.1 keeps backgrounds from falling apart."""
    repeats: int = Field(default=1, ge=1)
    """How often each subject picture is seen per epoch, on top of a kohya folder's own count."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of draws with an empty caption, which keeps guidance working in long runs. 0.05 to 0.1 is usual."""
    background: str = Field(default="#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """Colour put behind transparent pixels, as #rrggbb."""
    cache_folder: Path | None = None
    """Where encoded pictures and captions are cached. None: cache in output_dir. Runs may share a folder and use it at
    the same time; see `finetune cache FOLDER`."""
    prior: PriorConfig | None = None
    """Prior preservation with class pictures; rows with role=class in the folder's metadata are class pictures too.
    None turns the rendering off."""
