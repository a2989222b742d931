"""Fields of the exported files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class ExportConfig(Section):
    """Which files a finished run becomes."""

    formats: tuple[Literal["diffusers", "kohya", "peft", "merged"], ...] = ("diffusers", "kohya")
    """diffusers and peft for Python; kohya for ComfyUI, A1111, Forge and InvokeAI; merged: a whole pipeline folder."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of the exported tensors."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """File name of the kohya file, without ending; also the title readers show. None: the name of output_dir."""
