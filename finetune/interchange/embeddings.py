"""Learned words (textual inversion) in files that other programs read: bundled with an adapter, and on their own.

diffusers 0.42 loads these files in our tests (loaders/textual_inversion.py). For A1111 and ComfyUI the key names follow
what is known of their readers and a published bundling script; those programs were not run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.header import open_tensors, read_header
from finetune.interchange.adapter import Adapter, InterchangeError
from finetune.interchange.layouts import BESIDE, WORD, resolve
from finetune.interchange.names import Architecture, published
from finetune.interchange.sources import words_beside

Files = dict[str, tuple[dict[str, Tensor], dict[str, str]]]
"""Path relative to the adapter's folder -> (tensors, metadata)."""


def bundled(adapter: Adapter) -> dict[str, Tensor]:
    """Entries of a kohya file, fp32.

    One text encoder: `bundle_emb.<word>.string_to_param.*`; several: one tensor per encoder, `...clip_l`, `...clip_g`.

    Raises:
        InterchangeError: for words with a dot, which readers take for the end of the word.
    """
    dotted = [word for word in adapter.tokens if "." in word or not word]
    if dotted:
        raise InterchangeError(
            "Learned words with a dot cannot be bundled: programs cut them at the dot.",
            [f"the word {word!r}." for word in dotted] + ["--to ours and --to diffusers keep them."],
        )
    return {
        f"bundle_emb.{word}.{reader_key(adapter.architecture, component, 'string_to_param.*')}": vectors
        for word, encoders in adapter.tokens.items()
        for component, vectors in encoders.items()
    }


def alone(adapter: Adapter, folder: str) -> tuple[Files, dict[str, str]]:
    """(one embedding file per word, the metadata entry that tells an adapter's readers of them).

    With one text encoder the only key is the word itself, which diffusers takes for the token, while A1111 and ComfyUI
    take the file's name; with several the keys are those of A1111 and ComfyUI.
    """
    files: Files = {}
    for word, name in file_names(adapter.tokens).items():
        encoders = adapter.tokens[word].items()
        tensors = {reader_key(adapter.architecture, part, word): vectors for part, vectors in encoders}
        files[f"{folder}/{name}"] = (tensors, {"format": "pt", WORD: word})
    return files, beside(adapter.tokens, folder)


def beside(words: Iterable[str], folder: str) -> dict[str, str]:
    """The metadata entry that tells an adapter's readers of words in files of their own; none without words."""
    places = {word: f"{folder}/{name}" for word, name in file_names(words).items()}
    return {BESIDE: json.dumps(places, ensure_ascii=False)} if places else {}


def file_names(words: Iterable[str]) -> dict[str, str]:
    """Word -> its file, under the name that A1111 and ComfyUI users write in prompts; no two alike."""
    names: dict[str, str] = {}
    for word in words:
        plain = re.sub(r"[^\w.+-]+", "-", word).strip("-.") or "word"
        taken = {name.lower() for name in names.values()}
        endings = (f"-{number}" if number > 1 else "" for number in count(1))
        names[word] = next(
            name for ending in endings if (name := f"{plain}{ending}.safetensors").lower() not in taken
        )  # fmt: skip
    return names


def words_folder(path: Path) -> str:
    """Name of the folder beside an adapter file where its embeddings lie."""
    return f"{path.stem}.embeddings"


def read_beside(path: Path, adapter: Adapter) -> list[str]:
    """Add the words that lie in files of their own; returns those whose file is missing, in words."""
    missing = []
    for word, file in words_beside(path, adapter.metadata).items():
        if word in adapter.tokens:
            continue
        if file.is_file():
            adapter.tokens[word] = read_embedding(file, adapter.architecture)
        else:
            missing.append(f"the learned word {word!r} lies in {file}, which is missing: put it back.")
    return missing


def read_embedding(file: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Text encoder -> vectors of the one word that a file holds.

    Raises:
        InterchangeError: if the file is not an embedding of one word.
    """
    header = read_header(file)
    resolved = resolve(header)
    if resolved.kind != "embedding" or len(resolved.tokens) != 1:
        raise InterchangeError(f"{file} is not an embedding of one word.", ["expected a textual inversion embedding."])
    (vectors,) = resolved.tokens.values()
    with open_tensors(header) as tensors:
        return {
            text_encoder(architecture, key): torch.from_numpy(np.array(tensors.array(name), dtype=np.float32, ndmin=2))
            for key, name in vectors.items()
        }


def reader_key(architecture: Architecture, component: str, only: str) -> str:
    """How readers call the tensor for a text encoder: `only` where a base has one encoder."""
    return only if len(_encoders(architecture)) == 1 else architecture.networks[component].comfy.split(".")[1]


def reader_keys(family: str, components: Iterable[str]) -> dict[str, str]:
    """What readers call the tensors for some text encoders -> the encoder; empty where a base has one."""
    table = next(table for table in published() if table.family == family)
    return {key: name for name in components if (key := reader_key(table, name, ""))}


def text_encoder(architecture: Architecture, key: str) -> str:
    """The component that readers call "clip_l" or "clip_g", or the one text encoder there is."""
    encoders = _encoders(architecture)
    if key in encoders or not encoders:
        return key
    named = (name for name in encoders if f".{key}." in f".{architecture.networks[name].comfy}.")
    return next(named, encoders[0])


def _encoders(architecture: Architecture) -> list[str]:
    return sorted(name for name in architecture.networks if name != architecture.denoiser)
