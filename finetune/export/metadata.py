"""The header of a written adapter: ModelSpec, what kohya's readers show, hashes; nothing private.

Sources: Stability-AI/ModelSpec 1.0.1; sd-scripts train_network.py and train_util.py for the ss_* and sshs_*
    keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from finetune import storage
from finetune.export.errors import ExportError
from finetune.export.job import Job
from finetune.export.privacy import private_parts, public_name
from finetune.version import VERSION

LEGACY_SPAN = (0x100000, 0x10000)
"""Offset and length in bytes of the stretch that A1111's old short hash covers."""


MINIMAL = (
    "format", "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.title",
    "modelspec.license", "modelspec.author", "modelspec.trigger_phrase", "modelspec.prediction_type",
    "ss_base_model_version", "ss_v2", "ss_network_module", "ss_output_name",
)  # fmt: skip
"""What every file says, whatever detail is asked for: readers choose by it how to load the file."""


def modelspec(job: Job, kind: str = "lora") -> dict[str, str]:
    """Entries of ModelSpec 1.0.1 and our own provenance, without hashes; empty ones are left out.

    Args:
        kind: what the file is to its architecture: "lora", "textual-inversion", or empty for a whole model.

    Raises:
        ExportError: if an entry holds an absolute path, a token or the home folder.
    """
    info, header = job.info, job.file.header
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}
    triggers = ", ".join(header.trigger_words)
    denoiser: Any = job.components.denoiser
    architecture = job.family.modelspec(denoiser.config, job.components.scheduler_config)
    entries = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}" if kind else architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": info.title or job.name,
        "modelspec.description": info.description,
        "modelspec.author": info.author,
        "modelspec.license": info.license,
        "modelspec.date": _date(),
        "modelspec.resolution": f"{info.resolution}x{info.resolution}" if info.resolution else "",
        "modelspec.trigger_phrase": triggers,
        "modelspec.usage_hint": f"Write {triggers} in the prompt." if triggers else "",
        "modelspec.thumbnail": info.thumbnail,
        "modelspec.prediction_type": prediction.get(
            job.components.scheduler_config.get("prediction_type", ""), ""
        ),
        "finetune.trainer": f"finetune {VERSION}",
        "finetune.base": public_name(header.base),
        "finetune.base_digest": header.base_digest,
        "finetune.run_digest": header.run_digest,
        "finetune.dataset_digest": info.dataset_digest,
        "finetune.step": str(header.step),
        "finetune.method": json.dumps(header.method, sort_keys=True),
        **_configuration(job),
    }
    return _public(_asked(job, entries))


def kohya(job: Job) -> dict[str, str]:
    """The ss_* entries that A1111, InvokeAI, ComfyUI managers and sd-scripts read, but for those about the network."""
    info, header = job.info, job.file.header
    version = job.family.kohya_base_version
    created = _created()
    count = info.images or 1
    # Tags of single pictures would give captions away; the trigger words are what a user of the file needs.
    tags = dict.fromkeys(header.trigger_words, count)
    subset = {"class_tokens": ", ".join(header.trigger_words), "img_count": count, "num_repeats": 1}
    entries = {
        "ss_base_model_version": version,
        "ss_v2": str("v2" in version),
        "ss_network_args": "{}",
        "ss_output_name": job.name,
        "ss_sd_model_name": public_name(header.base),
        "ss_steps": str(header.step),
        "ss_max_train_steps": str(header.step),
        "ss_resolution": f"({info.resolution}, {info.resolution})" if info.resolution else "",
        "ss_num_train_images": str(info.images) if info.images else "",
        "ss_learning_rate": f"{info.learning_rate:g}" if info.learning_rate is not None else "",
        "ss_optimizer": info.optimizer,
        "ss_seed": str(info.seed) if info.seed is not None else "",
        "ss_training_started_at": str(float(created)) if created is not None else "",
        "ss_tag_frequency": json.dumps({"training": tags}, ensure_ascii=False) if tags else "",
        "ss_datasets": json.dumps([{"subsets": [subset]}], ensure_ascii=False) if tags else "",
        "ss_dataset_dirs": json.dumps({"training": {"n_repeats": 1, "img_count": count}})
        if info.images
        else "",
    }
    return _public(_asked(job, entries))


def with_hashes(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> dict[str, str]:
    """The entries with ModelSpec's and kohya's hashes of the very bytes `storage.write_safetensors` writes.

    The model hash covers everything after the header. The legacy hash covers a stretch at one MiB, so it
    depends on the header's length but not on its words; a shorter file has none (its hash would be that of
    nothing).
    """
    digest = hashlib.sha256()
    for name in storage.tensor_order(tensors):
        digest.update(storage.tensor_bytes(tensors[name]))
    described = {
        **entries,
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
        "sshs_model_hash": digest.hexdigest(),
    }
    with_legacy = {**described, "sshs_legacy_hash": "0" * 8}
    legacy = hashlib.sha256()
    covered = 0
    for piece in _stretch(storage.safetensors_header(tensors, with_legacy), tensors):
        legacy.update(piece)
        covered += len(piece)
    return {**described, "sshs_legacy_hash": legacy.hexdigest()[:8]} if covered else described


def _asked(job: Job, entries: Mapping[str, str]) -> dict[str, str]:
    """Those entries that say something and are wanted."""
    minimal = job.info.detail == "minimal"
    return {name: value for name, value in entries.items() if value and (not minimal or name in MINIMAL)}


def _configuration(job: Job) -> dict[str, str]:
    """The whole run for detail "full"."""
    if job.info.detail != "full" or not job.info.configuration:
        return {}
    return {"finetune.run": json.dumps(job.info.configuration, sort_keys=True, ensure_ascii=False)}


def _public(entries: dict[str, str]) -> dict[str, str]:
    problems = [
        f"{name} holds {part}; everyone who gets the file could read it; remove it."
        for name, value in entries.items()
        for part in private_parts("" if name == "modelspec.thumbnail" else value)
    ]
    if problems:
        raise ExportError("The file's metadata would reveal something private.", problems)
    return entries


def _stretch(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file inside LEGACY_SPAN, piece by piece."""
    first, last = LEGACY_SPAN[0], sum(LEGACY_SPAN)
    position = 0
    for piece in (
        memoryview(header),
        *(storage.tensor_bytes(tensors[name]) for name in storage.tensor_order(tensors)),
    ):
        part = piece[max(0, first - position) : max(0, last - position)]
        if len(part):
            yield part
        position += len(piece)
        if position >= last:
            return


def _created() -> int | None:
    """Seconds since 1970 from SOURCE_DATE_EPOCH; never the clock, so that an export can be repeated byte for byte."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(epoch) if epoch.isdigit() else None


def _date() -> str:
    created = _created()
    return "" if created is None else datetime.fromtimestamp(created, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
