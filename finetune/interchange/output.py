"""What all layouts share: the value they make, and their ways of refusing, folding and casting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_tools.errors import counted
from finetune import storage
from finetune.interchange.adapter import Adapter, InterchangeError, Update
from finetune.interchange.embeddings import alone
from finetune.interchange.names import CLIP_ROOT
from finetune.interchange.reading import own_header, shortened

Number = TypeVar("Number", int, float)

KEPT_METADATA = ("ss_", "modelspec.", "finetune.", "sshs_")
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "ss_network_dim", "ss_network_alpha",
         "finetune.embeddings", "finetune.word")  # fmt: skip
"""Entries about other bytes than the ones that are written."""


@dataclass
class Output:
    """What a layout makes of an adapter.

    Attributes:
        files: name inside the folder -> (tensors, metadata); "" is the file itself, and others lie beside it.
        documents: name -> JSON document, for layouts that are folders.
        notes: what a user should know about the file.
    """

    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]]
    documents: dict[str, dict[str, object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file, or the folder, whole or not at all."""
        if "" in self.files:
            for name, (tensors, metadata) in self.files.items():
                storage.write_safetensors(path.parent / name if name else path, tensors, metadata)
            return
        with storage.atomic_dir(path) as folder:
            for name, (tensors, metadata) in self.files.items():
                storage.write_safetensors(folder / name, tensors, metadata)
            for name, document in self.documents.items():
                storage.write_json(folder / name, document)


def folded(update: Update, alpha: float | None) -> Update:
    """The same update for a file that says `alpha` (None: alpha = rank), with the rest of the strength in B."""
    rank = update.tensors["lora_A.weight"].shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    up = (update.tensors["lora_B.weight"].double() * (update.scale / scale)).float()
    return Update(update.method, {**update.tensors, "lora_B.weight": up}, scale, update.options)


def each(adapter: Adapter) -> Iterator[tuple[str, str, Update]]:
    """(component, layer, update) in order of name."""
    for component, module in sorted(adapter.updates):
        yield component, module, adapter.updates[component, module]


def methods(adapter: Adapter, component: str = "") -> set[str]:
    """The methods of one network's layers, or of all."""
    return {update.method for (owner, _), update in adapter.updates.items() if component in ("", owner)}


def refuse(adapter: Adapter, reasons: Mapping[str, str], bias: bool = False) -> None:
    """Say no for methods with a reason, and for changes of biases unless they can be kept."""
    counts = Counter(update.method for update in adapter.updates.values())
    problems = [f"{counted(count, 'layer is', 'layers are')} {method}: {reasons[method]}."
                for method, count in counts.items() if method in reasons]  # fmt: skip
    biases = [f"{c}.{m}" for c, m, update in each(adapter) if "diff_b" in update.tensors and not bias]
    if biases:
        change = counted(len(biases), "layer changes", "layers change")
        problems.append(f"{change} a bias (e.g. {biases[0]}): only --to kohya can store it.")
    if problems:
        raise InterchangeError("The adapter cannot be written in this layout.", shortened(problems))


def refuse_words_alone(adapter: Adapter) -> None:
    """Say no to an adapter without layers where a layout is a list of layers."""
    if not adapter.updates:
        raise InterchangeError(
            "The adapter contains only learned words, which this layout cannot store.",
            [f"{', '.join(adapter.tokens) or 'nothing at all'}; use --to kohya or --to ours."],
        )


def add_words(written: Output, adapter: Adapter, folder: str) -> None:
    """Add the adapter's learned words to what is written, as files of their own, and tell the adapter of them."""
    files, entry = alone(adapter, folder)
    for _, metadata in written.files.values():
        metadata.update(entry)
    written.files |= files
    if files:
        written.notes.append(
            f"learned words as separate files, for diffusers and the embeddings folders of A1111 and ComfyUI: "
            f"{', '.join(files)}."
        )


def usual(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """(the value that most layers have, the layers that have another)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {module: value for module, value in sorted(values.items()) if value != usual}


def target_endings(
    adapter: Adapter, component: str, chosen: Callable[[Update], bool] = lambda update: True
) -> list[str]:
    """The shortest name endings that select exactly the adapter's layers in a network, or the chosen ones of them.

    PEFT selects layers by the end of their names. Endings hold for every version of transformers, with `text_model.`
    or without; full names do not.
    """
    modules = [portable(name) for name in adapter.architecture.networks[component].layers]
    wanted = {portable(module) for module, update in adapter.of(component) if chosen(update)}
    owners: dict[str, set[bool]] = {}
    for module in modules:
        for ending in _endings(module):
            owners.setdefault(ending, set()).add(module in wanted)
    found = {next((end for end in _endings(module) if owners.get(end) == {True}), module) for module in wanted}
    return sorted(found)


def portable(module: str) -> str:
    """A layer's name without the root that only some versions of transformers give it."""
    return module.removeprefix(CLIP_ROOT)


def _endings(module: str) -> Iterator[str]:
    """From the shortest on; one that starts with a number would tell nobody anything."""
    parts = module.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    yield from (ending for ending in endings if not ending[0].isdigit())


def kept_metadata(adapter: Adapter) -> dict[str, str]:
    """What the file said about itself, without entries about other bytes."""
    stated = _stated(own_header(adapter.metadata)) | adapter.metadata
    return {"format": "pt"} | {
        key: value for key, value in stated.items() if key.startswith(KEPT_METADATA) and key not in STALE
    }


def _stated(header: Mapping[str, Any]) -> dict[str, str]:
    """The header of this toolkit's own file in the words that other programs read; nothing else is said."""
    words = ", ".join(str(word) for word in header.get("trigger_words") or ())
    base, step = str(header.get("base") or ""), str(header.get("step") or "")
    entries = {
        "modelspec.trigger_phrase": words,
        "modelspec.usage_hint": f"Write {words} in the prompt." if words else "",
        "finetune.base": base,
        "finetune.base_digest": str(header.get("base_digest") or ""),
        "finetune.run_digest": str(header.get("run_digest") or ""),
        "finetune.step": step,
        "ss_sd_model_name": base,
        "ss_steps": step,
    }
    return {name: value for name, value in entries.items() if value}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors in a number format.

    Raises:
        InterchangeError: if a value is too large for it.
    """
    narrow = {
        name: tensor if name.endswith(keep) or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    large = [name for name, tensor in narrow.items() if not bool(torch.isfinite(tensor.float()).all())]
    if large:
        raise InterchangeError(
            f"{counted(len(large), 'tensor holds', 'tensors hold')} values beyond {torch.finfo(dtype).max:.5g}, the "
            "largest of this number format.",
            [*shortened(large), "write it with --dtype fp32 or bf16."],
        )
    return narrow
