"""Fields of the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.config.section import Section


class ModelConfig(Section):
    """The base model that the adapter is trained on."""

    base: str
    """A diffusers folder, a single .safetensors checkpoint, a hub id such as
    stable-diffusion-v1-5/stable-diffusion-v1-5, or demo: the embedded base."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. None means its default branch."""
    variant: str | None = None
    """File variant inside the base, usually fp16. None means the plain files."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen base; trained parameters stay in fp32. auto: bf16 where the GPU computes in it, fp16
    on older GPUs, fp32 on a CPU."""
    storage: Literal["full", "fp8", "int8", "nf4", "host"] = "full"
    """How the frozen denoiser's weights are stored. full: in dtype. fp8 and int8: one byte per weight; nf4: half a byte
    (QLoRA). These save memory, are a little slower, and the adapter trains on rounded weights. host: unrounded in main
    memory and copied to the GPU layer by layer, which saves GPU memory but is slower."""
    vae: str | None = None
    """Another autoencoder: a folder, .safetensors file or hub id. None: the base's own."""
    text_encoders: dict[str, str] = Field(default_factory=dict)
    """Text encoders from elsewhere by pipeline name, e.g. text_encoder_2: t5xxl_fp16.safetensors; none leaves out an
    optional one (SD3's text_encoder_3). Needed for files that contain only a transformer."""
    skeleton: Path | None = None
    """For single files of unusual size, or with T5: a diffusers folder with the configurations and tokenizers; its
    weights are not needed. None: the built-in configuration of the detected family."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, for a single file that does not state it. None: as stated, else the family's
    convention."""
    zero_terminal_snr: bool | None = None
    """Whether the base's last timestep is pure noise, for a single file that does not state it. None: as stated, else
    no."""
    clip_skip: int | None = Field(default=None, ge=1, le=12)
    """CLIP layer to use, counted from the end as in A1111 and kohya: 1 is the last, 2 the one before (diffusers counts
    from 0 at the family's own layer). None: the family's own, 1 for SD1 and SD2, 2 for SDXL and SD3."""
    prompt_chunks: int = Field(default=1, ge=1, le=8)
    """How many chunks of 75 tokens CLIP reads of a caption; 3 reads 225 tokens, as A1111 does with long prompts."""
    t5_tokens: int | None = Field(default=None, ge=16, le=512)
    """How many tokens of a caption T5 reads. None: the family's own, 256 for SD3, 512 for Flux."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance strength given to a guidance-distilled denoiser (Flux dev) in training; 1 is usual."""
