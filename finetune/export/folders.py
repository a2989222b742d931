"""What stands in a pipeline folder besides weights: configurations, and vocabularies with learned words."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from finetune import storage
from finetune.adapters.tokens import add_words
from finetune.export.errors import ExportError
from finetune.export.job import Job
from finetune.export.privacy import private_parts

PRIVATE_KEYS = ("_name_or_path", "name_or_path")
"""Where libraries note the folder a model was loaded from."""
Words = tuple[int, Tensor]
"""(row of the first one, vectors one below the other)."""


@dataclass(frozen=True)
class Rows:
    """How learned words enlarge the embedding of a text encoder.

    Attributes:
        table: the live embedding's parameter.
        count: rows of the written one.
    """

    table: nn.Parameter
    count: int
    words: Words


def with_words(job: Job, component: str, tokenizer: Any) -> Any:
    """A tokenizer that knows the words learned for its text encoder."""
    words = job.file.token_vectors(component)
    if not words:
        return tokenizer
    knowing = copy.deepcopy(tokenizer)
    if problems := add_words(knowing, {word: len(vectors) for word, vectors in words.items()}):
        raise ExportError("The learned words do not fit the base model:", problems)
    return knowing


def word_rows(job: Job, component: str, network: nn.Module) -> Rows | None:
    """What the words learned for a text encoder do to its embedding; None where there are none."""
    words = job.file.token_vectors(component)
    if not words or component not in job.components.tokenizers:
        return None
    encoder: Any = network
    table = encoder.get_input_embeddings().weight
    knowing = with_words(job, component, job.components.tokenizers[component])
    first = int(knowing.convert_tokens_to_ids(next(iter(words))))
    vectors = torch.cat([vector.float() for vector in words.values()])
    if first > len(table):
        gap = torch.zeros(first - len(table), table.shape[1])
        first, vectors = len(table), torch.cat([gap, vectors])
    return Rows(table, max(len(table), first + len(vectors)), (first, vectors))


def save_config(network: nn.Module, folder: Path, dtype: torch.dtype, vocabulary: int | None) -> None:
    """A network's configuration under the name its library looks for."""
    if isinstance(network, ModelMixin):
        network.save_config(folder)
        return
    live: Any = network
    config = copy.deepcopy(live.config)
    config.dtype = dtype
    config.architectures = [type(network).__name__]
    if vocabulary is not None:
        config.vocab_size = vocabulary
    config.save_pretrained(folder)


def scrub(folder: Path) -> None:
    """Take the names of local folders out of every configuration the libraries wrote.

    Raises:
        ExportError: if something private is left.
    """
    problems = []
    for file in sorted(folder.rglob("*.json")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or file.name in {"vocab.json", "tokenizer.json"}:
            continue
        public = {key: entry for key, entry in value.items() if key not in PRIVATE_KEYS}
        if public != value:
            # keep: schedulers may hold -Infinity, which the libraries write and read; plain json does too.
            storage.write_text(file, json.dumps(public, indent=2, ensure_ascii=False) + "\n")
        problems += [
            f"{file.name} holds {part}." for text in _strings(public) for part in private_parts(text)
        ]
    if problems:
        raise ExportError(
            "A configuration file of the base contains something private; remove it from the base.", problems
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)
