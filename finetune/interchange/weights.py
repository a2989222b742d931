"""The weights of a whole model, one at a time: a diffusers folder or a single file in the original layout.

Nothing is loaded; tensors are read from the files when they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.header import Header, Tensors, open_tensors, read_header
from finetune.interchange.adapter import InterchangeError, Place, Update
from finetune.interchange.layouts import Resolved, resolve, weight_fits
from finetune.interchange.names import Architecture, canonical_module, from_base
from finetune.interchange.original_names import Piece

PROJECTION = "text_projection"
LARGEST_ODD_SHARE = 0.1
"""Share of weights of unpublished size in a published model: inpainting models have one, pruned ones many."""


@dataclass(frozen=True)
class Held:
    """A tensor of a model: where it lies, and which rows of which layers it is.

    Attributes:
        transposed: whether the file keeps its rows as columns, as OpenCLIP does with its projection.
    """

    tensors: Tensors
    name: str
    pieces: tuple[Piece, ...]
    transposed: bool = False

    def read(self, leaf: str = "weight") -> Tensor | None:
        """The tensor in fp32, or the layer's other one; None if the file has none."""
        name = self.name if leaf == "weight" else self.name.removesuffix("weight") + leaf
        if leaf != "weight" and (name == self.name or name not in self.tensors.header.tensors):
            return None
        found = read_tensor(self.tensors, name)
        return found.T.contiguous() if self.transposed else found


@dataclass
class Weights:
    """An open model.

    Attributes:
        architecture: the names of its layers; None if no model is open.
        files: component (or "" for a single file) -> open files.
        held: place -> the tensors that make up the layer's weight, with the rows they hold of it.
    """

    architecture: Architecture | None = None
    files: dict[str, list[Tensors]] = field(default_factory=dict)
    held: dict[Place, list[Held]] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether there is a model to ask."""
        return self.architecture is not None

    def weight(self, place: Place) -> Tensor:
        """The weight of a layer, in fp32.

        Raises:
            InterchangeError: if the model has no such layer.
        """
        found = self._rows(place, "weight")
        if found is None:
            raise InterchangeError(f"The base has no layer {'.'.join(place)}.", ["it is not the base of this adapter."])
        return found

    def bias(self, place: Place) -> Tensor | None:
        """The bias of a layer, in fp32; None if it has none."""
        return self._rows(place, "bias")

    def _rows(self, place: Place, leaf: str) -> Tensor | None:
        rows: dict[int, Tensor] = {}
        for part in self.held.get(place, ()):
            whole, position = part.read(leaf), 0
            if whole is None:
                return None
            if len(part.pieces) == 1 and part.pieces[0].start == 0:
                return whole
            for piece in part.pieces:
                size = piece.stop - piece.start
                if (piece.component, piece.module) == place:
                    rows[piece.start] = whole[position : position + size]
                position += size
        return torch.cat([rows[start] for start in sorted(rows)]) if rows else None

    def shape(self, place: Place) -> tuple[int, ...]:
        """Shape of that weight, from the headers alone."""
        parts = self.held[place]
        whole = parts[0].tensors.header.tensors[parts[0].name].shape
        if len(parts[0].pieces) == 1 and parts[0].pieces[0].start == 0:
            return whole[::-1] if parts[0].transposed else whole
        own = {(piece.start, piece.stop) for part in parts for piece in part.pieces
               if (piece.component, piece.module) == place}  # fmt: skip
        return (sum(stop - start for start, stop in own), *whole[1:])


    def misfits(self, updates: Mapping[Place, Update]) -> list[str]:
        """What keeps updates from being any of this model's layers, in words."""
        problems = [f"it has no layer {'.'.join(place)}." for place in updates if place not in self.held]
        for place, update in updates.items():
            if place in self.held and (problem := update.misfit(self.shape(place))):
                problems.append(f"{'.'.join(place)}: the adapter {problem}.")
            elif place in self.held and "diff_b" in update.tensors and self.bias(place) is None:
                problems.append(f"{'.'.join(place)} has no bias, which the adapter changes.")
        return sorted(problems)


@contextmanager
def open_weights(path: Path | None, names: Architecture | None = None) -> Iterator[Weights]:
    """Open a model for reading; None opens nothing.

    Args:
        names: of the layers of a single file that is of no published size, as `from_base` gives them.

    Raises:
        ConfigError: if the path is no model that is known here.
        CheckpointError, UnsafeError: if a file is damaged or a pickle.
    """
    with contextlib.ExitStack() as stack:
        if path is None:
            yield Weights()
        elif path.is_dir():
            yield _folder(path, stack)
        else:
            yield _single(path, stack, names)


def read_tensor(tensors: Tensors, name: str) -> Tensor:
    """A tensor in fp32."""
    return torch.from_numpy(np.array(tensors.array(name), dtype=np.float32))


def component_files(folder: Path, component: str) -> list[Path]:
    """The weight files of one network of a pipeline folder.

    Raises:
        ConfigError: if there are several variants, of which only the user knows which one counts.
    """
    found = sorted((folder / component).glob("*.safetensors"))
    plain = [file for file in found if file.name.count(".") == 1]
    variants = {file.name.split(".")[1] for file in found if file.name.count(".") > 1}
    if not plain and len(variants) > 1:
        raise ConfigError(
            f"{folder / component} holds several variants and no plain file.",
            [f"found {', '.join(sorted(variants))}; keep one of them in a copy of the folder."],
        )
    return plain or found


def _folder(path: Path, stack: contextlib.ExitStack) -> Weights:
    weights = Weights(from_base(path))
    for component in sorted(item.name for item in path.iterdir() if item.is_dir()):
        for file in component_files(path, component):
            tensors = stack.enter_context(open_tensors(read_header(file)))
            weights.files.setdefault(component, []).append(tensors)
            for name, entry in tensors.header.tensors.items():
                module, _, leaf = name.rpartition(".")
                if leaf == "weight":
                    place = component, canonical_module(component, module)
                    piece = Piece(*place, 0, entry.shape[0] if entry.shape else 0)
                    weights.held[place] = [Held(tensors, name, (piece,))]
    return weights


def _single(path: Path, stack: contextlib.ExitStack, names: Architecture | None) -> Weights:
    header: Header = read_header(path)
    resolved = resolve(header, names)
    if resolved.kind != "checkpoint" or resolved.architecture is None:
        raise ConfigError(
            f"{path} is not a known model.",
            ["name a pipeline folder or a single-file checkpoint of a published family; see `finetune inspect`."],
        )
    _check_sizes(path, header, resolved)
    tensors = stack.enter_context(open_tensors(header))
    weights = Weights(resolved.architecture, {"": [tensors]})
    for layer in resolved.layers:
        for piece in layer.pieces:
            parts = weights.held.setdefault((piece.component, piece.module), [])
            if not any(held.name == layer.parts["weight"] for held in parts):
                parts.append(Held(tensors, layer.parts["weight"], layer.pieces))
    for component, network in resolved.architecture.networks.items():
        name = f"{network.checkpoint}.{PROJECTION}"
        if PROJECTION in network.layers and network.checkpoint_style == "open_clip" and name in header.tensors:
            piece = Piece(component, PROJECTION, 0, network.layers[PROJECTION][0])
            weights.held[component, PROJECTION] = [Held(tensors, name, (piece,), transposed=True)]
    return weights


def _check_sizes(path: Path, header: Header, resolved: Resolved) -> None:
    """Refuse a file whose sizes are not those of the names it was read by: names of other sizes may mean others."""
    architecture = resolved.architecture
    assert architecture is not None, "a checkpoint is of some kind"
    odd = [layer for layer in resolved.layers if not weight_fits(header, layer.stem, layer.meaning, architecture)]
    fused = [layer for layer in odd if len(layer.pieces) > 1]
    if fused or len(odd) > LARGEST_ODD_SHARE * len(resolved.layers):
        shown = [f"{layer.stem} has the shape {header.tensors[layer.stem].shape}." for layer in [*fused, *odd][:3]]
        raise ConfigError(
            f"{path} looks like {architecture.title}, but {len(odd)} of {len(resolved.layers)} weights are of another "
            "size, so its names cannot be trusted.",
            [*shown, "give a pipeline folder of the same kind with --base."],
        )
