"""Files of every layout -> `Adapter`. Exact, or refused with all reasons at once; no tensor is left out silently."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import counted
from finetune.dtypes import STORED
from finetune.errors import ConfigError, first_few
from finetune.header import Tensors, clean, open_tensors
from finetune.interchange.adapter import Adapter, InterchangeError, Place, Update
from finetune.interchange.embeddings import read_beside, text_encoder
from finetune.interchange.layouts import OURS, Layer, said
from finetune.interchange.names import CLIP_ROOT, Architecture, published, table_of
from finetune.interchange.original_names import Piece
from finetune.interchange.sources import Source, of_no_published_size, open_sources

PLAIN_NUMBERS = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"}
"""Number formats without a fraction, in which weights are only packed."""
REASONS = {
    "glora": "is a GLoRA, which no other layout can express",
    "nothing": "has parts that do not form an update",
}
"""Method -> why it cannot be read."""


def read_adapter(path: Path, base: Path | None = None, *, whole: bool = True) -> Adapter:
    """Read an adapter, whoever made it.

    Args:
        path: a .safetensors file, a PEFT folder, or a folder of PEFT folders.
        base: pipeline folder of the base it is for; needed for bases of no published size, whose fused layers could
            not be taken apart.
        whole: refuse an adapter whose learned words' files are missing; otherwise its `left_out` names them.

    Raises:
        ConfigError: if there is nothing, or it is no adapter.
        CheckpointError, UnsafeError: if a file is damaged or a pickle.
        InterchangeError: for keys that are not known and updates that cannot be had exactly; all of them.
    """
    sources = open_sources(path, table_of(base))
    return adapter_from(path, sources, whole=whole)


def adapter_from(path: Path, sources: list[Source], *, whole: bool = True) -> Adapter:
    """The adapter that some opened files make up; see `read_adapter`."""
    wrong = [source for source in sources if source.resolved.kind not in ("adapter", "embedding")]
    if wrong:
        raise ConfigError(
            f"{path} is not an adapter but {_kind(wrong[0].resolved.kind)}.",
            ["see `finetune inspect`; to extract an adapter from a whole model use `finetune extract`."],
        )
    architecture = next((source.resolved.architecture for source in sources if source.resolved.architecture), None)
    if architecture is None and sources[0].resolved.kind == "embedding":
        architecture = _of_words(sources[0])
    unknown = [name for source in sources for name in source.resolved.unknown]
    if unknown or architecture is None:
        raise InterchangeError(
            f"{path} holds {counted(len(unknown), 'tensor')} with unknown names, so it cannot be read completely."
            if unknown
            else f"{path} does not say which kind of base its learned words are for.",
            [*shortened(unknown), "if its base is not a published model, give the base's folder with --base."],
        )
    adapter = Adapter({}, architecture, dict(sources[0].header.metadata), sources[0].layout)
    adapter.candidates = sources[0].resolved.candidates if len(sources[0].resolved.candidates) > 1 else ()
    adapter.guessed = of_no_published_size(sources)
    problems: list[str] = []
    widest: list[torch.dtype] = []
    for source in sources:
        with open_tensors(source.header) as tensors:
            for layer in source.resolved.layers:
                _add(adapter, source, layer, tensors, problems)
            for found, vectors in source.resolved.tokens.items():
                word = found or path.stem
                # A word of one vector may lack the first side.
                named = {
                    text_encoder(architecture, key): torch.atleast_2d(_tensor(tensors, name))
                    for key, name in vectors.items()
                }
                adapter.tokens.setdefault(word, {}).update(named)
        widest += [
            STORED.get(source.header.tensors[name].dtype, torch.float32)
            for layer in source.resolved.layers
            for part, name in layer.parts.items()
            if part not in ("alpha", "on_input")
        ]
    if problems:
        raise InterchangeError(f"{path} cannot be read exactly.", shortened(problems))
    adapter.dtype = max(widest, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16), default=torch.float32)
    _name_tokens(adapter)
    adapter.left_out = read_beside(path, adapter)
    if adapter.left_out and whole:
        raise InterchangeError(f"{path} has learned words that cannot be read.", shortened(adapter.left_out))
    return adapter


def shortened(problems: Iterable[str]) -> list[str]:
    """The first few, cleaned for a terminal, and how many more there are."""
    return first_few(clean(problem) for problem in problems)


def _kind(kind: str) -> str:
    return {"checkpoint": "a whole model"}.get(kind, "something unknown")


def _of_words(source: Source) -> Architecture | None:
    """The base that learned words are for: the one the file names, else the simplest published one of their widths."""
    family = own_header(source.header.metadata).get("family")
    tables = sorted(published(), key=lambda table: len(table.networks))
    for table in tables:
        if table.family == family or (not family and said(source.header.metadata, table)):
            return table
    for table in tables:
        encoders = {}
        for vectors in source.resolved.tokens.values():
            for key, name in vectors.items():
                encoders[key] = text_encoder(table, key), source.header.tensors[name].shape[-1:]
        distinct = len({component for component, _ in encoders.values()}) == len(encoders)
        fitting = distinct and all(_width(table, component) == width for component, width in encoders.values())
        if fitting:
            return table
    return None


def _width(table: Architecture, component: str) -> tuple[int, ...] | None:
    """Shape of one vector of a text encoder: that of the norm at its end."""
    return next((table.shape(component, f"{root}final_layer_norm") for root in (CLIP_ROOT, "")
                 if table.shape(component, f"{root}final_layer_norm")), None)  # fmt: skip


def _add(adapter: Adapter, source: Source, layer: Layer, tensors: Tensors, problems: list[str]) -> None:
    """Read one layer of a file into `adapter`, or say in `problems` why not."""
    try:
        update = _update(source, layer, tensors)
        for place, part in _split(adapter.architecture, layer, update).items():
            if place in adapter.updates:
                raise _Unreadable("changes a layer that another key of the file changes too")
            shape = adapter.architecture.shape(*place) or ()
            adapter.updates[place] = replace(part, shape=shape)
    except _Unreadable as reason:
        problems.append(f"{layer.stem} {reason}.")


class _Unreadable(Exception):
    """Why a layer cannot be had; the words follow its name."""


def _update(source: Source, layer: Layer, tensors: Tensors) -> Update:
    method = layer.method
    if method in REASONS:
        raise _Unreadable(REASONS[method])
    parts = {
        part: _tensor(tensors, name)
        for part, name in layer.parts.items()
        if part not in ("alpha", "on_input") or method == "diag-oft"
    }
    whole = [name for part, name in layer.parts.items()
             if part in parts and source.header.tensors[name].dtype in PLAIN_NUMBERS and part != "alpha"]  # fmt: skip
    if whole:
        raise _Unreadable(f"holds whole numbers ({whole[0]}), which only the program that packed them can unpack")
    if any(not bool(torch.isfinite(tensor).all()) for tensor in parts.values()):
        raise _Unreadable("holds numbers that are not finite")
    if "lora_B.bias" in parts and parts.pop("lora_B.bias").any():
        raise _Unreadable("trains a bias of the update (lora_bias), which no other layout can express")
    if method in ("loha", "lokr", "oft") and "lora_magnitude_vector" in parts:
        raise _Unreadable(f"joins {method} with DoRA's magnitudes, which only LyCORIS supports")
    try:
        parts = _in_our_terms(method, parts, layer, tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise _Unreadable(f"has parts that make no {method} together ({', '.join(sorted(parts))})") from error
    update = Update(method, parts)
    if problem := update.problem():
        raise _Unreadable(problem)
    return replace(update, scale=source.scale(layer, update.rank, tensors), options=_options(source, layer))


def _in_our_terms(method: str, parts: dict[str, Tensor], layer: Layer, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of a layer under PEFT's names and in its shapes."""
    found = dict(parts)
    if method == "dora":
        found["lora_magnitude_vector"] = _magnitude(found, layer.parts["lora_magnitude_vector"])
    if method == "ia3" and "weight" in found:
        on_input = bool(_tensor(tensors, layer.parts["on_input"]).any()) if "on_input" in layer.parts else True
        gains = 1 + found.pop("weight").flatten()
        found["ia3_l"] = gains.reshape(1, -1) if on_input else gains.reshape(-1, 1)
    if "set_weight" in found:
        found["weight"] = found.pop("set_weight")
    if "lora_mid.weight" in found:
        found["lora_A.weight"] = _without_core(found.pop("lora_mid.weight"), found["lora_A.weight"])
    return found


def _options(source: Source, layer: Layer) -> dict[str, object]:
    """PEFT's OFT computes its rotation by a series of five terms unless it was told not to."""
    settings = source.settings.get(layer.pieces[0].component, {})
    if source.layout == "ours":
        return dict(settings.get("options", {}))
    if layer.method != "oft" or source.layout != "peft" or not settings.get("use_cayley_neumann", True):
        return {}
    return {"cayley_terms": int(settings.get("num_cayley_neumann_terms", 5))}


def _tensor(tensors: Tensors, name: str) -> Tensor:
    array = tensors.array(name)
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype)).float()


def _magnitude(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """DoRA's magnitudes per output, in PEFT's shape: (out,), or (1, out, 1, 1) for a convolution.

    LyCORIS can also keep one per input, which no other layout can.
    """
    magnitude, up = parts["lora_magnitude_vector"], parts["lora_B.weight"]
    out = up.shape[0]
    of_lycoris = name.endswith("dora_scale")
    if magnitude.numel() != out or (of_lycoris and magnitude.ndim > 1 and magnitude.shape[0] != out):
        raise _Unreadable(
            f"has DoRA magnitudes of shape {tuple(magnitude.shape)} for {out} outputs: one per input, as in "
            "older LyCORIS and A1111, which no other layout can express"
        )
    return magnitude.reshape(-1) if up.ndim == 2 else magnitude.reshape(1, -1, *[1] * (up.ndim - 2))


def _without_core(core: Tensor, down: Tensor) -> Tensor:
    """LyCORIS' Tucker form (rank, rank, kh, kw) x (rank, in, 1, 1) as one kernel (rank, in, kh, kw): the same sum."""
    return torch.einsum("rskl,si->rikl", core.double(), down.flatten(1).double()).float()


def _split(architecture: Architecture, layer: Layer, update: Update) -> dict[Place, Update]:
    """The update of a layer of the file as updates of layers of the base."""
    pieces = layer.pieces
    first = pieces[0]
    shape = architecture.shape(first.component, first.module) or ()
    if len(pieces) == 1 and first.start == 0:
        return {(first.component, first.module): update}
    rows = sum(piece.stop - piece.start for piece in pieces)
    found = _rows(update)
    if found is not None and found != rows:
        raise _Unreadable(
            f"joins several layers and has {found} rows where {architecture.title} has {rows}; name the base it is for "
            f"with --base ({first.module} has {shape[0] if shape else 'no'} rows)"
        )
    sources: dict[Place, list[tuple[int, Piece]]] = {}
    position = 0
    for piece in pieces:
        sources.setdefault((piece.component, piece.module), []).append((position, piece))
        position += piece.stop - piece.start
    result = {}
    for place, parts in sources.items():
        in_order = sorted(parts, key=lambda part: part[1].start)
        index = torch.cat([torch.arange(start, start + piece.stop - piece.start) for start, piece in in_order])
        part = take_rows(update, index)
        # A fused layer whose rows for one of its layers are all zero leaves that one alone.
        said = part.tensors.get("lora_B.weight") if part.is_low_rank else part.tensors.get("diff")
        if said is None or said.any() or ("diff_b" in part.tensors and part.tensors["diff_b"].any()):
            result[place] = part
    return result


def _rows(update: Update) -> int | None:
    for part, axis in (("lora_B.weight", 0), ("diff", 0), ("diff_b", 0), ("hada_w1_a", 0), ("weight", 0)):
        if part in update.tensors and "hada_t1" not in update.tensors:
            return update.tensors[part].shape[axis]
    return None


def take_rows(update: Update, index: Tensor) -> Update:
    """The update of the layer that has only some rows of another, in the order of `index`; exact.

    Raises:
        _Unreadable: if the method's change cannot be cut there.
    """
    tensors = dict(update.tensors)
    by_row = {"lora_B.weight", "lora_magnitude_vector", "diff", "diff_b", "weight", "bias", "boft_s"}
    if update.method == "loha" and "hada_t1" not in tensors:
        by_row |= {"hada_w1_a", "hada_w2_a"}
    elif update.method == "ia3" and tensors["ia3_l"].shape[0] != 1:
        by_row |= {"ia3_l"}
    elif update.method == "lokr":
        return replace(update, tensors=_kron_rows(tensors, index))
    elif update.method in ("loha", "diag-oft"):
        raise _Unreadable(f"joins several layers in one {update.method}, which cannot be taken apart exactly")
    tensors = {part: tensor[index] if part in by_row else tensor for part, tensor in tensors.items()}
    if update.is_low_rank:
        # A fused layer trained as separate ones stacks their factors; what is zero for this layer is dropped.
        used = tensors["lora_B.weight"].flatten(1).any(dim=0)
        if 0 < int(used.sum()) < used.numel():
            tensors["lora_A.weight"] = tensors["lora_A.weight"][used]
            tensors["lora_B.weight"] = tensors["lora_B.weight"][:, used]
    return replace(update, tensors=tensors)


def _kron_rows(tensors: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Rows of C kron D that are whole rows of C."""
    part = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
    if "lokr_t2" in tensors:
        height = tensors["lokr_w2_a"].shape[1]
    else:
        height = tensors["lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a"].shape[0]
    blocks = index.reshape(-1, height) if index.numel() % height == 0 else index.reshape(1, -1)
    first = blocks[:, 0] // height
    if blocks.shape[1] != height or not torch.equal(blocks, first[:, None] * height + torch.arange(height)):
        raise _Unreadable("joins several layers in one LoKr whose blocks do not end where the layers do")
    return {**tensors, part: tensors[part][first]}


def _name_tokens(adapter: Adapter) -> None:
    """Our own files number learned words and name them in their header."""
    words = [str(word) for word in own_header(adapter.metadata).get("tokens", ())]
    if words:
        adapter.tokens = {
            words[int(key)] if key.isdigit() and int(key) < len(words) else key: vectors
            for key, vectors in adapter.tokens.items()
        }


def own_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of this toolkit's own files; empty for others. Whether it is sound was checked on opening."""
    own = json.loads(metadata.get(OURS, "{}"))
    return own if isinstance(own, dict) else {}
