"""Adapter files in the layouts their readers expect: `interchange` knows the spellings, this adds the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune import storage
from finetune.export import metadata
from finetune.export.embeddings import FOLDER
from finetune.export.errors import ExportError
from finetune.export.interchange import as_lora, lost_share, to_interchange, without_alpha
from finetune.export.job import Job, Outcome
from finetune.export.privacy import public_name
from finetune.interchange.adapter import Adapter, InterchangeError
from finetune.interchange.embeddings import beside
from finetune.interchange.layouts import LOSSES
from finetune.interchange.output import Output, portable, usual
from finetune.interchange.sources import PEFT_CONFIG
from finetune.interchange.writing import WRITERS

LAYOUTS = ("diffusers", "kohya", "peft")
"""The layouts of `interchange` that are exported; each is a format of the same name."""


def writer(layout: str) -> Callable[[Job, Path], Outcome]:
    """How an adapter file of one layout is written.

    The function raises ExportError if the layout cannot say what the adapter does, with the reason and the formats
    that can; or if a value is too large for the number format.
    """

    def write(job: Job, path: Path) -> Outcome:
        written, outcome = _written(job, layout)
        if layout == "peft":
            _complete_peft(job, written)
        for name, (tensors, stated) in written.files.items():
            entries = metadata.modelspec(job) | (metadata.kohya(job) if layout == "kohya" else {})
            if outcome.lost:
                told = {"cause": " ".join(outcome.notes), "total": float(f"{outcome.lost:.6g}")}
                entries |= {LOSSES: json.dumps([told], ensure_ascii=False)}
            entries |= beside(job.file.header.tokens, FOLDER)
            entries = {**entries, **{key: value for key, value in stated.items() if value}}
            storage.write_safetensors(path / name, tensors, metadata.with_hashes(tensors, entries))
        for name, document in written.documents.items():
            storage.write_json(path / name, document)
        return outcome

    return write


def carried_by(job: Job, adapter: Adapter) -> list[str]:
    """The adapter layouts that can say exactly what an adapter does."""
    found = []
    for layout in LAYOUTS:
        try:
            WRITERS[layout](adapter, torch.float32, False)
        except InterchangeError:
            continue
        found.append(layout)
    return found


def _written(job: Job, layout: str) -> tuple[Output, Outcome]:
    adapter = without_alpha(to_interchange(job)) if layout == "kohya" else to_interchange(job)
    try:
        return WRITERS[layout](adapter, job.dtype, False), Outcome()
    except InterchangeError as error:
        if any("number format" in problem for problem in (str(error), *error.problems)):
            raise ExportError(f"The adapter is too strong for {job.dtype_name}: export it as bf16 or fp32.",
                              [*error.problems]) from error  # fmt: skip
        if job.lossy is None:
            raise _refused(job, layout, adapter, error) from error
    wanted, notes = as_lora(job, adapter, job.lossy)
    outcome = Outcome(wanted=wanted, lost=lost_share(job, wanted), notes=tuple(notes))
    return WRITERS[layout](wanted, job.dtype, False), outcome


def _refused(job: Job, layout: str, adapter: Adapter, error: InterchangeError) -> ExportError:
    exact = [*(name for name in carried_by(job, adapter) if name != layout), "merged", "single-file"]
    reasons = [problem.split("; use --")[0].rstrip(".") + "." for problem in error.problems]
    return ExportError(
        f"The {layout} layout cannot carry this adapter exactly.",
        [
            *reasons,
            f"exact with `finetune export`: {', '.join(f'--format {name}' for name in exact)}; --allow-lossy writes a "
            "LoRA in its place and measures what that loses.",
        ],
    )


def _complete_peft(job: Job, written: Output) -> None:
    """Fields of adapter_config.json that only the run knows: the base's name, and the rank of LoKr's whole factors."""
    for component in {name.removesuffix(f"/{PEFT_CONFIG}") for name in written.documents}:
        document = written.documents[f"{component}/{PEFT_CONFIG}"]
        document["base_model_name_or_path"] = public_name(job.file.header.base)
        if document["peft_type"] == "LOKR":
            # keep: PEFT takes a factor for whole if the rank reaches half its side, so it must know the trained one.
            document.update(_strengths(job, component))


def _strengths(job: Job, component: str) -> Mapping[str, Any]:
    layers = [layer for owner, layer in job.file.layers() if owner == component]
    rank, ranks = usual({portable(layer): job.file.rank(component, layer) for layer in layers})
    alpha, alphas = usual({portable(layer): job.file.alpha(component, layer) for layer in layers})
    return {"r": rank, "rank_pattern": ranks, "alpha": alpha, "alpha_pattern": alphas}
