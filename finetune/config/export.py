"""Fields of the exported files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.config.section import Section

Format = Literal["diffusers", "kohya", "peft", "merged", "single-file", "embeddings"]
NumberFormat = Literal["fp32", "fp16", "bf16"]
Openness = Literal["minimal", "public", "full"]


class ExportConfig(Section):
    """Which files a finished run becomes."""

    formats: tuple[Format, ...] = ("diffusers", "kohya")
    """diffusers and peft for Python; kohya for ComfyUI, A1111, Forge and InvokeAI; merged: a whole pipeline folder;
    single-file: a whole checkpoint; embeddings: learned words, which are written beside the others anyway."""
    dtype: NumberFormat = "fp16"
    """Number format of the exported tensors."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """File name of the kohya file, without ending; also the title readers show. None: the name of output_dir."""
    metadata: Openness = "public"
    """What files say about themselves. minimal: how to load them, trigger words, author and licence; public: how they
    were trained too; full: the whole configuration too. Never a path, a user, a host or a token."""
    license: str = ""
    """Licence of what is published: an SPDX id or a name the hub knows, such as openrail++. Empty leaves it open."""
    author: str = ""
    """Who made it, as it shall be shown in files and on the model card."""
    description: str = Field(default="", max_length=4000)
    """A paragraph for the model card and for model managers."""
