"""What the parts of an export share: what is exported, and what writing a format came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.files import AdapterFile
from finetune.dtypes import DTYPES
from finetune.export.streaming import Digests
from finetune.families.base import Components, ModelFamily
from finetune.interchange.adapter import Adapter
from finetune.sampling.apply import network


@dataclass(frozen=True)
class ModelInfo:
    """What a file says about itself besides its weights. Everything is optional; nothing is guessed.

    Attributes:
        title: shown by model managers; the file's name if empty.
        resolution: side of the training pictures in pixels.
        images: number of training pictures.
        learning_rate: the denoiser's, as the run used it.
        optimizer: its name.
        seed: of the run.
        dataset_digest: SHA-256 over the data set's manifest.
        thumbnail: a small picture as a data URL, shown by model managers; empty for none.
        configuration: the run's configuration without places, for detail "full".
        detail: "minimal": what readers need, title, trigger words and licence. "public": and how it was
            trained. "full": and the whole configuration. None of them holds a path, a user, a host or a token.
    """

    title: str = ""
    description: str = ""
    author: str = ""
    license: str = ""
    resolution: int | None = None
    images: int | None = None
    learning_rate: float | None = None
    optimizer: str = ""
    seed: int | None = None
    dataset_digest: str = ""
    thumbnail: str = ""
    configuration: dict[str, Any] = field(default_factory=dict)
    detail: str = "public"


@dataclass(frozen=True)
class Job:
    """One export: what, from where, how.

    Attributes:
        components: the live base, with no adapter attached; it is read and never changed.
        name: file name without an ending.
        dtype: number format of the written weights.
        force: write a merged model although rounding takes more of the adapter than is allowed.
        lossy: rank of the LoRA that stands in for what a layout cannot say; None refuses instead.
    """

    file: AdapterFile
    family: ModelFamily
    components: Components
    name: str
    dtype: torch.dtype
    info: ModelInfo
    force: bool = False
    lossy: int | None = None

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """(component, live network) for every network of the base that an adapter may change."""
        for component in (self.family.denoiser, *self.components.text_encoders):
            module = network(self.family, self.components, component)
            assert module is not None, component
            yield component, module

    @property
    def dtype_name(self) -> str:
        """The number format as users write it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


@dataclass(frozen=True)
class Rounding:
    """What rounding takes from the adapter, as shares: of all layers, and of the layer that loses most."""

    total: float
    worst: float
    worst_module: str


@dataclass(frozen=True)
class Outcome:
    """What writing a format came to.

    Attributes:
        rounding: for a merged model, what its number format takes from the adapter.
        wanted: what was written in place of the adapter, where it is an approximation.
        lost: share of the adapter's change of the weights that an approximation takes; 0 if there is none.
        notes: what a user should know about the file.
        digests: of a merged model, file -> what each of its tensors must read back as.
    """

    rounding: Rounding | None = None
    wanted: Adapter | None = None
    lost: float = 0.0
    notes: tuple[str, ...] = ()
    digests: Mapping[Path, Digests] = field(default_factory=dict)
