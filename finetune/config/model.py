"""Fields of the base model."""

from __future__ import annotations

from typing import Literal

from finetune.config.section import Section


class ModelConfig(Section):
    """The base model that the adapter is trained on."""

    base: str
    """A diffusers folder, a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or demo: the embedded base."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. None means its default branch."""
    variant: str | None = None
    """File variant inside the base, usually fp16. None means the plain files."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen base; what is trained stays in fp32. auto: bf16 where the GPU computes in it, fp16
    on older GPUs, fp32 on a CPU."""
