"""The header of a written adapter: ModelSpec, what kohya's readers show, hashes; nothing private.

Sources: Stability-AI/ModelSpec 1.0.1; sd-scripts train_network.py and train_util.py for the ss_* and sshs_*
    keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from finetune import storage
from finetune.export.job import ExportError, Job

SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")
SHORTEST_SECRET = 8
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.@~+-]+){2,}|(?<!\w)[A-Za-z]:\\|\\\\\w")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
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
    papers, header = job.papers, job.file.header
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}
    triggers = ", ".join(header.trigger_words)
    denoiser: Any = job.components.denoiser
    architecture = job.family.modelspec(denoiser.config, job.components.scheduler_config)
    entries = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}" if kind else architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": papers.title or job.name,
        "modelspec.description": papers.description,
        "modelspec.author": papers.author,
        "modelspec.license": papers.license,
        "modelspec.tags": ", ".join(papers.tags),
        "modelspec.date": _date(job),
        "modelspec.resolution": f"{papers.resolution}x{papers.resolution}" if papers.resolution else "",
        "modelspec.trigger_phrase": triggers,
        "modelspec.usage_hint": f"Write {triggers} in the prompt." if triggers else "",
        "modelspec.thumbnail": papers.thumbnail,
        "modelspec.prediction_type": prediction.get(
            job.components.scheduler_config.get("prediction_type", ""), ""
        ),
        "finetune.base": public_name(header.base),
        "finetune.base_digest": header.base_digest,
        "finetune.run_digest": header.run_digest,
        "finetune.dataset_digest": papers.dataset_digest,
        "finetune.step": str(header.step),
        "finetune.method": json.dumps(header.method, sort_keys=True),
        **_configuration(job),
        **papers.extra,
    }
    return _public(_asked(job, entries))


def kohya(job: Job) -> dict[str, str]:
    """The ss_* entries that A1111, InvokeAI, ComfyUI managers and sd-scripts read, but for those about the network."""
    papers, header = job.papers, job.file.header
    version = job.family.kohya_base_version
    created = _created(job)
    count = papers.images or 1
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
        "ss_resolution": f"({papers.resolution}, {papers.resolution})" if papers.resolution else "",
        "ss_num_train_images": str(papers.images) if papers.images else "",
        "ss_learning_rate": f"{papers.learning_rate:g}" if papers.learning_rate is not None else "",
        "ss_optimizer": papers.optimizer,
        "ss_seed": str(papers.seed) if papers.seed is not None else "",
        "ss_training_started_at": str(float(created)) if created is not None else "",
        "ss_tag_frequency": json.dumps({"training": tags}, ensure_ascii=False) if tags else "",
        "ss_datasets": json.dumps([{"subsets": [subset]}], ensure_ascii=False) if tags else "",
        "ss_dataset_dirs": json.dumps({"training": {"n_repeats": 1, "img_count": count}})
        if papers.images
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


def public_name(base: str) -> str:
    """A base model's name without the folders it lies in; hub ids ("owner/name") stay whole."""
    is_path = base.startswith(("/", "~", ".")) or "\\" in base or base.count("/") > 1
    return PurePosixPath(base.replace("\\", "/")).name if is_path else base


def private_parts(text: str) -> list[str]:
    """What in a text should not leave this machine, in words: paths, the home folder, tokens."""
    home = str(Path.home())
    secrets = {
        name: value
        for name, value in os.environ.items()
        if any(part in name.upper() for part in SECRET_NAMES) and len(value) >= SHORTEST_SECRET
    }
    found = [
        f"the value of the environment variable {name}" for name, value in secrets.items() if value in text
    ]
    if HUB_TOKEN.search(text):
        found.append("a hub token")
    if len(home) > 1 and home in text:
        found.append("the home folder")
    elif match := ABSOLUTE_PATH.search(text):
        found.append(f"the path {match[0]}")
    return found


def _asked(job: Job, entries: Mapping[str, str]) -> dict[str, str]:
    """Those entries that say something and are wanted."""
    minimal = job.papers.detail == "minimal"
    return {name: value for name, value in entries.items() if value and (not minimal or name in MINIMAL)}


def _configuration(job: Job) -> dict[str, str]:
    """The whole run for detail "full"."""
    if job.papers.detail != "full" or not job.papers.configuration:
        return {}
    return {"finetune.run": json.dumps(job.papers.configuration, sort_keys=True, ensure_ascii=False)}


def _public(entries: dict[str, str]) -> dict[str, str]:
    problems = [
        f"{name} holds {part}; everyone who gets the file could read it: take it out."
        for name, value in entries.items()
        for part in private_parts("" if name == "modelspec.thumbnail" else value)
    ]
    if problems:
        raise ExportError("The file's metadata would give away something private.", problems)
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


def _created(job: Job) -> int | None:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(epoch) if epoch.isdigit() else job.papers.created


def _date(job: Job) -> str:
    created = _created(job)
    if created is None:
        return ""
    return datetime.fromtimestamp(created, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
