"""Fields of what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.config.section import Section

RANK = 16
"""The rank where none is named."""
MethodName = Literal["lora", "rslora", "locon", "dora", "loha", "lokr", "oft", "boft", "ia3", "full"]


class BlockConfig(Section):
    """Layers that differ from the rest of their adapter."""

    pattern: str = Field(min_length=1)
    """Regular expression found anywhere in a layer's name, e.g. mid_block or attn2; the first that fits counts."""
    rank: int | None = Field(default=None, ge=0, le=1024)
    """Width of the update in these layers; 0 leaves them out. None means the adapter's."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength in these layers. None keeps alpha / rank as it is in the rest of the adapter."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of these layers. None means the adapter's."""


class EncoderConfig(Section):
    """What differs for one of several text encoders; None everywhere means as the rest."""

    rank: int | None = Field(default=None, ge=1, le=1024)
    """Width of the update."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength. None keeps alpha / rank."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate."""


class NetworkAdapterConfig(Section):
    """How the layers of a network are changed, and how much of it."""

    method: MethodName = "lora"
    """lora, rslora, locon (with convolutions), dora, loha, lokr, oft, boft, ia3; or full: the weights themselves."""
    rank: int = Field(default=RANK, ge=1, le=1024)
    """Width of the update; file size and memory grow with it. oft, boft: size of a block. ia3, full: unused."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength: the update is scaled by alpha / rank (rslora: alpha / sqrt(rank)). None means alpha = rank."""
    conv_rank: int | None = Field(default=None, ge=1, le=1024)
    """Width in convolutions larger than 1x1. None means rank."""
    conv_alpha: float | None = Field(default=None, gt=0)
    """Strength in convolutions larger than 1x1. None keeps alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share dropped in training: of an adapter's inputs; of a weight's rows (loha, lokr); of its blocks (oft, boft)."""
    targets: str | None = None
    """Layers: attention, attention+mlp, all, or a regular expression over whole names. None: attention; locon: all;
    full: everything."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How lora's factors start. pissa and olora start from the weights' own directions; their files have twice the
    rank."""
    blocks: tuple[BlockConfig, ...] = ()
    """Layers with a rank, alpha or learning rate of their own, e.g. [{pattern: mid_block, rank: 4}]."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of this adapter. None means optimizer.learning_rate. full: 1e-6 to 5e-6 is usual."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: learning rate of lora_B over that of lora_A; 1 is plain LoRA, 16 the paper's advice."""
    lokr_factor: int = Field(default=-1, ge=-1)
    """lokr: size of the left Kronecker factor, larger means fewer parameters. -1: near the square root."""
    tucker: bool = False
    """loha, lokr: decompose whole kernels of convolutions, with fewer parameters."""


class AdapterConfig(NetworkAdapterConfig):
    """What is trained, and how large it is."""

    start_from: Path | None = None
    """An adapter to continue from, in any layout that `finetune inspect` reads, with the same layers and ranks as this
    run."""
    merge_first: tuple[str, ...] = ()
    """Adapters of any layout merged into the base before training, each as path or path@weight."""


class TextAdapterConfig(NetworkAdapterConfig):
    """What is trained of the text encoders."""

    per_encoder: dict[str, EncoderConfig | None] = Field(default_factory=dict)
    """What differs for one encoder, e.g. {text_encoder_2: {rank: 4}}; null leaves that encoder frozen."""
    train_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps after which the text encoders stop; 0.5 trains them in the first half only."""
