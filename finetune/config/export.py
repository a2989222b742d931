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

    formats: tuple[Format, ...] | None = None
    """diffusers and peft for Python; kohya for ComfyUI, A1111, Forge and InvokeAI; merged: a whole pipeline folder;
    single-file: a whole checkpoint; embeddings: learned words, which are written beside the others anyway. None:
    diffusers and kohya where they can store the method exactly, and peft where diffusers cannot. []: no export."""
    dtype: NumberFormat = "fp16"
    """Number format of the exported tensors."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """File name of the kohya file, without ending; also the title. None: the name of output_dir."""
    metadata: Openness = "public"
    """How much files tell about themselves. minimal: how to load them, trigger words, author and licence; public: also
    how they were trained; full: also the whole configuration. Never a path, user, host or token."""
    license: str = ""
    """Licence of the published files: an SPDX id or a licence name of the hub, such as openrail++. Empty: none is
    stated."""
    author: str = ""
    """Author shown in files and on the model card."""
    description: str = Field(default="", max_length=4000)
    """A paragraph for the model card and for model managers."""
