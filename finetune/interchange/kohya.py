"""`Adapter` -> a file in kohya's layout, with LyCORIS' keys for its methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.adapters.updates import UPDATES
from finetune.interchange.adapter import Adapter, InterchangeError, Update
from finetune.interchange.carrying import remedies
from finetune.interchange.embeddings import bundled
from finetune.interchange.original_names import Piece
from finetune.interchange.output import Output, cast, folded, kept_metadata, methods, refuse
from finetune.interchange.reading import shortened

KOHYA_PARTS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}

DORA_NOTE = "DoRA is written as in LyCORIS; other programs apply it differently."


def write_kohya(adapter: Adapter, dtype: torch.dtype, lossy: bool) -> Output:
    """One file for A1111, Forge, ComfyUI, InvokeAI and sd-scripts, with LyCORIS' keys for its methods.

    diffusers takes one alpha for several layers of a UNet, so alpha is kept only if all layers have the same. Where
    ranks are equal, strength is folded into lora_up until they have; where they differ, the whole strength is folded in
    and alpha = rank: unsaid for UNets, as every reader takes it so, and said for transformers, whose networks in
    sd-scripts (lora_flux.py, lora_sd3.py) fail without.

    Source: sd-scripts networks/lora.py; LyCORIS modules/*.py for the other methods' keys.
    """
    # keep: a DoRA under LyCORIS' keys is what --allow-lossy writes.
    refuse(adapter, {name: why for name, why in remedies("kohya").items() if not (lossy and name == "dora")}, bias=True)
    layers = list(kohya_layers(adapter))
    low_rank = [update for _, update in layers if update.is_low_rank]
    rank = max((update.rank or 1 for update in low_rank), default=1)
    alpha, fold = _common_alpha(low_rank)
    always_said = adapter.architecture.denoiser != "unet"
    tensors: dict[str, Tensor] = {}
    for name, update in layers:
        if update.is_low_rank:
            written = folded(update, alpha) if fold else update
            if alpha is not None or always_said:
                tensors[f"{name}.alpha"] = _kohya_alpha(written)
        else:
            written = _strength_in_tensors(update)
            if update.method in UPDATES and UPDATES[update.method].scaled:
                tensors[f"{name}.alpha"] = _kohya_alpha(written)
        tensors |= {f"{name}.{part}": tensor for part, tensor in _kohya_parts(written).items()}
    # keep: learned words stay fp32, as they are few and every program computes with them in fp32.
    tensors = cast(tensors, dtype, keep=("alpha",)) | bundled(adapter)
    stated_entries = {
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{rank if alpha is None else alpha:g}",
        "ss_network_module": "networks.lora" if len(low_rank) == len(layers) else "lycoris.kohya",
    }
    versions = adapter.architecture.kohya_versions
    metadata = {"ss_base_model_version": versions[0], **kept_metadata(adapter), **(stated_entries if low_rank else {})}
    notes = [DORA_NOTE] * ("dora" in methods(adapter))
    notes += ["diffusers refuses kohya files with learned words; use --to diffusers for it."] * bool(adapter.tokens)
    return Output({"": (tensors, metadata)}, notes=notes)


def _common_alpha(updates: Sequence[Update]) -> tuple[float | None, bool]:
    """(the alpha that all layers shall say, None for no alpha at all; whether that must be folded in)."""
    ranks = {update.rank or 1 for update in updates}
    alphas = {round(update.scale * (update.rank or 1), 9) for update in updates}
    if len(alphas) == 1 and len(ranks) == 1:
        return alphas.pop(), False
    return (float(ranks.pop()), True) if len(ranks) == 1 else (None, True)


def kohya_layers(adapter: Adapter) -> Iterator[tuple[str, Update]]:
    """(name, update) of every layer of a kohya file, in order of name.

    Where kohya's trainer knows several layers as one, their updates are joined: exactly, though the joint rank may be
    the sum of theirs.

    Raises:
        InterchangeError: if updates of such a layer cannot be joined.
    """
    problems = []
    joined: dict[str, Update] = {}
    for component in adapter.components():
        network = adapter.architecture.networks[component]
        prefix = network.kohya[0]
        updates = dict(adapter.of(component))
        if component != adapter.architecture.denoiser or adapter.architecture.kohya_names != "original":
            joined |= {f"{prefix}_{module}".replace(".", "_"): update for module, update in updates.items()}
            continue
        for original, pieces in network.original().items():
            parts = [(piece, updates[piece.module]) for piece in pieces if piece.module in updates]
            if parts:
                rows = sum(piece.stop - piece.start for piece in pieces)
                try:
                    joined[f"{prefix}_{original}".replace(".", "_")] = join(pieces, dict(updates), rows)
                except InterchangeError as error:
                    problems += [f"{original}: {problem}" for problem in error.problems]
    if problems:
        raise InterchangeError("The kohya layout fuses layers whose updates cannot be fused.", shortened(problems))
    if nameless := _nameless(adapter):
        raise InterchangeError("The kohya layout has no names for some layers.", shortened(nameless))
    yield from sorted(joined.items())


def _nameless(adapter: Adapter) -> list[str]:
    """Layers that no program's original names cover, such as Flux' norms of queries and keys."""
    component = adapter.architecture.denoiser
    if adapter.architecture.kohya_names != "original":
        return []
    original = adapter.architecture.networks[component].original()
    named = {piece.module for pieces in original.values() for piece in pieces}
    return [f"{component}.{module} has none." for module, _ in adapter.of(component) if module not in named]


def join(pieces: tuple[Piece, ...], updates: Mapping[str, Update], rows: int) -> Update:
    """One update for a layer that holds rows of others; layers without an update stay unchanged.

    Raises:
        InterchangeError: for methods that cannot be joined.
    """
    present = [updates[piece.module] for piece in pieces if piece.module in updates]
    if len(pieces) == 1 and pieces[0].start == 0:
        return present[0]
    if all(update.method == "diff" for update in present):
        return _stacked(pieces, updates, rows)
    if not all(update.is_low_rank for update in present):
        named = " and ".join(sorted({update.method for update in present}))
        raise InterchangeError("", [f"{named} cannot be fused exactly; --to peft keeps the layers separate."])
    first = present[0].tensors["lora_A.weight"]
    shared = all(
        update.scale == present[0].scale and torch.equal(update.tensors["lora_A.weight"], first) for update in present
    )
    downs: dict[str, tuple[int, Tensor]] = {}
    width = 0
    for module, update in updates.items():
        if any(piece.module == module for piece in pieces):
            down = update.tensors["lora_A.weight"]
            downs[module] = (0 if shared else width, down)
            width += 0 if shared else down.shape[0]
    width = first.shape[0] if shared else width
    up = torch.zeros(rows, width)
    position = 0
    for piece in pieces:
        if piece.module in updates:
            update, (column, down) = updates[piece.module], downs[piece.module]
            own = update.tensors["lora_B.weight"].flatten(1)[piece.start : piece.stop]
            factor = 1.0 if shared else update.scale
            up[position : position + piece.stop - piece.start, column : column + down.shape[0]] = own * factor
        position += piece.stop - piece.start
    tall = first if shared else torch.cat([down for _, down in downs.values()])
    return Update("lora", {"lora_A.weight": tall, "lora_B.weight": up}, present[0].scale if shared else 1.0)


def _stacked(pieces: tuple[Piece, ...], updates: Mapping[str, Update], rows: int) -> Update:
    """Whole changes one below the other; zero where nothing changes."""
    found: dict[str, Tensor] = {}
    position = 0
    for piece in pieces:
        stop = position + piece.stop - piece.start
        for part, tensor in updates[piece.module].tensors.items() if piece.module in updates else ():
            whole = found.setdefault(part, torch.zeros(rows, *tensor.shape[1:]))
            whole[position:stop] = tensor[piece.start : piece.stop]
        position = stop
    return Update("diff", found)


def _kohya_parts(update: Update) -> dict[str, Tensor]:
    parts = {KOHYA_PARTS.get(part, part): tensor for part, tensor in update.tensors.items()}
    if "dora_scale" in parts:
        ones = [1] * (update.tensors["lora_A.weight"].ndim - 1)
        parts["dora_scale"] = parts["dora_scale"].reshape(-1, *ones)
    if update.method == "ia3":
        gains = parts.pop("ia3_l")
        parts["weight"] = gains.flatten() - 1
        parts["on_input"] = torch.tensor(gains.shape[0] == 1)
    return parts


def _strength_in_tensors(update: Update) -> Update:
    """A LoKr of two whole factors has strength 1 in kohya files, whatever alpha says, so the first one takes it."""
    if update.method != "lokr" or update.rank is not None or update.scale == 1.0:
        return update
    return replace(update, tensors={**update.tensors, "lokr_w1": update.scale * update.tensors["lokr_w1"]}, scale=1.0)


def _kohya_alpha(update: Update) -> Tensor:
    """alpha with which a reader of kohya files arrives at the same strength."""
    return torch.tensor(update.scale * (update.rank or 1))
