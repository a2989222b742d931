"""An adapter as a value: its tensors under canonical names, and where it comes from.

It is what a run saves, and what sampling and export read.

Names are ours and stay the same whatever the installed libraries call their modules:

    <component>.<layer>.<suffix>            "unet.mid_block.attentions.0.proj_in.lora_A.weight"
    <text encoder>.token_embedding.<i>      vectors of the i-th learned word, shape (vectors, width)

The component is the pipeline's name of the network ("unet", "transformer", "text_encoder_2"), CLIP layers carry
`text_model.`, and the suffixes are listed per method in `updates.UPDATES`, which also says what they do to a layer.
Strength is kept beside the tensors, never folded into them: `AdapterFile.scale`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import storage
from finetune.adapters.updates import UPDATES
from finetune.errors import CheckpointError

DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
TOKENS = "token_embedding"
"""What stands in place of a layer's name for the vectors of learned words."""
HEADER_KEY = "finetune_adapter"
"""The metadata entry that holds the header as JSON."""
VERSION = 2
LARGEST_SCALE = 1e4
"""alpha / rank beyond this is taken for a damaged or hostile file."""


@dataclass(frozen=True)
class AdapterHeader:
    """Where an adapter comes from and how strongly it is applied.

    Attributes:
        family: name in FAMILIES, e.g. "sd1".
        base: what the user called the base model; never an absolute path.
        base_digest: SHA-256 of the base's weights; see `Components.digest`.
        method: component -> name in UPDATES, e.g. {"unet": "lora"}; a component that only learned words has none.
        rank: component -> width of its updates.
        alpha: component -> strength; see `AdapterFile.scale`.
        trigger_words: what to write in a prompt to call the subject or style.
        run_digest: SHA-256 of the configuration that trained it.
        step: optimizer steps it was trained for.
        tokens: learned words, in the order of their numbers in tensor names.
        rank_pattern: "<component>.<layer>" -> rank, for layers whose rank is another than their component's.
        alpha_pattern: the same for alpha.
        options: what methods need besides, e.g. {"cayley_terms": 5}; and {"merged_first": [...]}, what was merged
            into the base before training.
    """

    family: str
    base: str
    base_digest: str
    method: dict[str, str]
    rank: dict[str, int]
    alpha: dict[str, float]
    trigger_words: tuple[str, ...]
    run_digest: str
    step: int
    tokens: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class AdapterFile:
    """Tensors of an adapter in fp32 under canonical names, scale not folded in, and their header."""

    tensors: dict[str, Tensor]
    header: AdapterHeader

    def rank(self, component: str, layer: str = "") -> int:
        """Width of a layer's update; of most layers of the component if no layer is named."""
        return self.header.rank_pattern.get(f"{component}.{layer}", self.header.rank[component])

    def alpha(self, component: str, layer: str = "") -> float:
        """Strength of a layer's update before it is divided by the rank."""
        return self.header.alpha_pattern.get(f"{component}.{layer}", self.header.alpha[component])

    def scale(self, component: str, layer: str = "") -> float:
        """What a layer's update is multiplied by: alpha / rank.

        For "rslora" it is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732); 1 where a method has none.
        """
        method = self.header.method[component]
        if not UPDATES[method].scaled:
            return 1.0
        rank = self.rank(component, layer)
        return self.alpha(component, layer) / (math.sqrt(rank) if method == "rslora" else rank)

    def layers(self) -> dict[tuple[str, str], dict[str, Tensor]]:
        """(component, layer) -> suffix -> tensor, in order of name; learned words are not among them."""
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name in sorted(self.tensors):
            place = self.place(name)
            if place is not None and place[1] != TOKENS:
                component, layer, suffix = place
                found.setdefault((component, layer), {})[suffix] = self.tensors[name]
        return found

    def token_vectors(self, component: str) -> dict[str, Tensor]:
        """Learned word -> its vectors for one text encoder, shape (vectors, width)."""
        names = {word: f"{component}.{TOKENS}.{i}" for i, word in enumerate(self.header.tokens)}
        return {word: self.tensors[name] for word, name in names.items() if name in self.tensors}

    def place(self, name: str) -> tuple[str, str, str] | None:
        """(component, layer, suffix) of a tensor's name; None if it is no name of this adapter's methods."""
        component, _, rest = name.partition(".")
        layer, _, number = rest.rpartition(".")
        if layer == TOKENS:
            return (component, layer, number) if number.isdigit() else None
        method = self.header.method.get(component)
        if method not in UPDATES:
            return None
        if not UPDATES[method].layouts:
            return (component, layer, number) if layer else None
        suffixes = {suffix for layout in UPDATES[method].layouts for suffix in layout}
        suffix = next((suffix for suffix in suffixes if rest.endswith(f".{suffix}")), None)
        return (component, rest.removesuffix(f".{suffix}"), suffix) if suffix else None

    def modules(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(component, layer, A, B) of all layers that hold lora_A and lora_B, in order of name."""
        for (component, layer), tensors in self.layers().items():
            if DOWN[1:] in tensors and UP[1:] in tensors:
                yield component, layer, tensors[DOWN[1:]], tensors[UP[1:]]

    def components(self) -> list[str]:
        """The networks whose layers it changes, in order of name."""
        return sorted({component for component, _ in self.layers()})

    def problems(self) -> list[str]:
        """What makes the tensors and the header contradict themselves or each other; empty if they fit."""
        unknown = {component: m for component, m in self.header.method.items() if m not in UPDATES}
        found = [
            f"the header names method {method!r} for {component}; known are {', '.join(UPDATES)}."
            for component, method in sorted(unknown.items())
        ]
        found += [self._name_problem(name) for name in sorted(self.tensors) if self.place(name) is None]
        for (component, layer), tensors in self.layers().items():
            found += self._layer_problems(component, layer, tensors)
        for component in self.components():
            found += self._scale_problems(component)
        return [*found, *self._token_problems()]

    def save(self, path: Path) -> None:
        """Write it as one safetensors file; the same bytes every time."""
        header = {"version": VERSION, **asdict(self.header)}
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        tensors = {name: tensor.detach().to(torch.float32) for name, tensor in self.tensors.items()}
        storage.write_safetensors(path, tensors, {"format": "pt", HEADER_KEY: text})

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read what `save` wrote, or an older version did, and check that header and tensors fit each other.

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

    def _name_problem(self, name: str) -> str:
        component = name.partition(".")[0]
        method = self.header.method.get(component)
        if method not in UPDATES:
            return f"{name} is not named <component>.<layer>.<suffix> for a component with a method in the header."
        suffixes = sorted({suffix for layout in UPDATES[method].layouts for suffix in layout})
        return f"{name} is not named <component>.<layer>.<suffix> with a suffix of {method}: {', '.join(suffixes)}."

    def _layer_problems(self, component: str, layer: str, tensors: dict[str, Tensor]) -> list[str]:
        """One layer's tensors must be one of its method's layouts, and of the rank that the header gives."""
        update = UPDATES[self.header.method[component]]
        name = f"{component}.{layer}"
        if update.layouts and frozenset(tensors) not in update.layouts:
            nearest = min(update.layouts, key=lambda layout: len(layout ^ tensors.keys()))
            missing, extra = sorted(nearest - tensors.keys()), sorted(tensors.keys() - nearest)
            parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} too"] * bool(extra)
            return [f"{name} {' and '.join(parts)}."]
        shown = update.rank(tensors)
        if shown is not None and component in self.header.rank and shown != self.rank(component, layer):
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors.values())
            return [f"{name} has shapes {shapes}, which do not fit the header's rank {self.rank(component, layer)}."]
        return []

    def _scale_problems(self, component: str) -> list[str]:
        if not UPDATES[self.header.method[component]].scaled:
            return []
        if component not in self.header.rank or component not in self.header.alpha:
            return [f"the header gives no rank or no alpha for {component}."]
        layers = [""] + [layer for owner, layer in self.layers() if owner == component]
        pairs = {(self.rank(component, layer), self.alpha(component, layer)) for layer in layers}
        return [
            f"the header gives {component} rank {rank} and alpha {alpha}: not a usable scale."
            for rank, alpha in sorted(pairs, key=str)
            if rank < 1 or not math.isfinite(alpha) or not 0 < abs(alpha) / rank <= LARGEST_SCALE
        ]

    def _token_problems(self) -> list[str]:
        places = [place for name in self.tensors if (place := self.place(name)) and place[1] == TOKENS]
        count = len(self.header.tokens)
        problems = [
            f"{component}.{TOKENS}.{number} belongs to no word: the header names {count}."
            for component, _, number in sorted(places)
            if int(number) >= count
        ]
        numbers = {int(number) for _, _, number in places}
        return problems + [
            f"the header names the word {word!r}, but no {TOKENS}.{i} holds its vectors."
            for i, word in enumerate(self.header.tokens)
            if i not in numbers
        ]


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
        if version not in (1, VERSION):
            raise CheckpointError(
                f"{path} has version {version!r} of the adapter format and this toolkit reads 1 to {VERSION}.",
                ["update the toolkit, or export the adapter with the version that wrote it."],
            )
        if version == 1:
            fields["method"] = dict.fromkeys(fields["rank"], fields["method"])
        return AdapterHeader(
            **{
                **fields,
                "method": {str(name): str(method) for name, method in fields["method"].items()},
                "trigger_words": tuple(str(word) for word in fields["trigger_words"]),
                "tokens": tuple(str(word) for word in fields.get("tokens", ())),
                "rank": _numbers(fields["rank"], int),
                "alpha": _numbers(fields["alpha"], float),
                "rank_pattern": _numbers(fields.get("rank_pattern", {}), int),
                "alpha_pattern": _numbers(fields.get("alpha_pattern", {}), float),
                "options": dict(fields.get("options", {})),
                "step": int(fields["step"]),
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has an unreadable header.", [f"{type(error).__name__}: {error}; restore it from a copy."]
        ) from error


def _numbers(values: dict[str, Any], kind: type) -> dict[str, Any]:
    return {str(name): kind(value) for name, value in values.items()}
