"""An adapter as a value: its tensors under canonical names, and where it comes from.

It is what a run saves, and what sampling and export read.

Names are ours and stay the same whatever the installed libraries call their modules:
`<component>.<module>.lora_A.weight` (rank, in[, kh, kw]) and `.lora_B.weight` (out, rank[, 1, 1]), where the
component is the pipeline's name of the network ("unet", "text_encoder") and CLIP modules carry `text_model.`.
The update is

    delta_weight = alpha / rank * lora_B @ lora_A

and the factor is kept beside the tensors, never folded into them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import storage
from finetune.errors import CheckpointError

ADAPTER_FILE = "adapter.safetensors"
"""Name of the finished adapter in a run folder."""
DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
HEADER_KEY = "finetune_adapter"
"""The metadata entry that holds the header as JSON."""
VERSION = 1
LARGEST_SCALE = 1e4
"""alpha / rank beyond this is taken for a damaged or hostile file."""


@dataclass(frozen=True)
class AdapterHeader:
    """Where an adapter comes from and how strongly it is applied.

    Attributes:
        family: name in FAMILIES, e.g. "sd1".
        base: what the user called the base model; never an absolute path.
        base_digest: SHA-256 of the base's weights; see `Components.digest`.
        method: name of the adapter method, e.g. "lora".
        rank: component -> width of its updates.
        alpha: component -> strength; the update is scaled by alpha / rank.
        trigger_words: what to write in a prompt to call the subject or style.
        run_digest: SHA-256 of the configuration that trained it.
        step: optimizer steps it was trained for.
    """

    family: str
    base: str
    base_digest: str
    method: str
    rank: dict[str, int]
    alpha: dict[str, float]
    trigger_words: tuple[str, ...]
    run_digest: str
    step: int


@dataclass
class AdapterFile:
    """Tensors of an adapter in fp32 under canonical names, scale not folded in, and their header."""

    tensors: dict[str, Tensor]
    header: AdapterHeader

    def scale(self, component: str) -> float:
        """What lora_B @ lora_A of a component is multiplied by: alpha / rank."""
        return self.header.alpha[component] / self.header.rank[component]

    def modules(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(component, module, A, B) in order of name, without modules that lack A or B: see `problems`."""
        for name in sorted(self.tensors):
            up_name = name.removesuffix(DOWN) + UP
            if name.endswith(DOWN) and up_name in self.tensors:
                component, _, module = name.removesuffix(DOWN).partition(".")
                yield component, module, self.tensors[name], self.tensors[up_name]

    def components(self) -> list[str]:
        """The networks it changes, in order of name."""
        return sorted({component for component, *_ in self.modules()})

    def problems(self) -> list[str]:
        """What makes the tensors and the header contradict themselves or each other; empty if they fit."""
        found = [problem for name in sorted(self.tensors) for problem in self._name_problems(name)]
        for component, module, down, up in self.modules():
            rank = self.header.rank.get(component)
            if rank is not None and (rank != down.shape[0] or up.ndim < 2 or rank != up.shape[1]):
                found.append(
                    f"{component}.{module} has shapes {tuple(down.shape)} and {tuple(up.shape)}, "
                    f"which do not fit the header's rank {rank}."
                )
        for component in self.components():
            found += self._scale_problems(component)
        return found

    def save(self, path: Path) -> None:
        """Write it as one safetensors file; the same bytes every time."""
        header = {"version": VERSION, **asdict(self.header)}
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        tensors = {name: tensor.detach().to(torch.float32) for name, tensor in self.tensors.items()}
        storage.write_safetensors(path, tensors, {"format": "pt", HEADER_KEY: text})

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read what `save` wrote, and check that header and tensors fit each other.

        Raises:
            CheckpointError: if the file is damaged, of another kind, or contradicts itself.
        """
        tensors, metadata = storage.read_safetensors(path)
        if HEADER_KEY not in metadata:
            raise CheckpointError(
                f"{path} is not an adapter written by this toolkit.",
                [f"its metadata has no {HEADER_KEY!r}; name the adapter.safetensors of a run."],
            )
        file = cls(tensors, _parse_header(path, metadata[HEADER_KEY]))
        if problems := file.problems():
            raise CheckpointError(
                f"{path} contradicts itself; restore it from a copy or train again.", problems
            )
        return file

    def _name_problems(self, name: str) -> list[str]:
        ending = next((ending for ending in (DOWN, UP) if name.endswith(ending)), None)
        if ending is None or "." not in name.removesuffix(ending):
            return [f"{name} is not named <component>.<module>{DOWN} or {UP}."]
        other = name.removesuffix(ending) + (UP if ending == DOWN else DOWN)
        return [] if other in self.tensors else [f"{name} has no counterpart {other}."]

    def _scale_problems(self, component: str) -> list[str]:
        if component not in self.header.rank or component not in self.header.alpha:
            return [f"the header gives no rank or no alpha for {component}."]
        rank, alpha = self.header.rank[component], self.header.alpha[component]
        if rank < 1 or not math.isfinite(alpha) or not 0 < abs(alpha) / rank <= LARGEST_SCALE:
            return [f"the header gives {component} rank {rank} and alpha {alpha}: not a usable scale."]
        return []


def delta_weight(down: Tensor, up: Tensor) -> Tensor:
    """The unscaled update lora_B @ lora_A in the layout of the layer's weight.

    Args:
        down: shape (rank, in) for a linear layer, (rank, in, kh, kw) for a convolution.
        up: shape (out, rank) or (out, rank, 1, 1).

    Returns:
        shape (out, in) or (out, in, kh, kw), in the number format of the arguments.
    """
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _parse_header(path: Path, text: str) -> AdapterHeader:
    try:
        fields: dict[str, Any] = json.loads(text)
        version = fields.pop("version")
        if version != VERSION:
            raise CheckpointError(
                f"{path} has version {version!r} of the adapter format and this toolkit reads {VERSION}.",
                ["update the toolkit, or export the adapter with the version that wrote it."],
            )
        return AdapterHeader(
            **{
                **fields,
                "trigger_words": tuple(str(word) for word in fields["trigger_words"]),
                "rank": {str(name): int(rank) for name, rank in fields["rank"].items()},
                "alpha": {str(name): float(alpha) for name, alpha in fields["alpha"].items()},
                "step": int(fields["step"]),
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has an unreadable header.", [f"{type(error).__name__}: {error}; restore it from a copy."]
        ) from error
