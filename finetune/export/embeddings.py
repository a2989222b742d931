"""Learned words as files of their own: textual-inversion embeddings for diffusers, A1111, Forge and ComfyUI."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from finetune import storage
from finetune.adapters.tokens import names_of
from finetune.export import metadata
from finetune.export.errors import ExportError
from finetune.export.interchange import architecture
from finetune.export.job import Job, Outcome
from finetune.interchange.embeddings import file_names
from finetune.interchange.layouts import WORD
from finetune.sampling.generate import build_pipeline

FOLDER = "embeddings"
"""Where the files lie, one per word; the name A1111 and ComfyUI give the folder they read them from."""


def write_words(job: Job, path: Path) -> Outcome:
    """One file per word, under the names its readers look for.

    `emb_params` where one text encoder knows the word, `clip_l` and `clip_g` where two do (SDXL). Programs call the
    word by the file's name; diffusers takes `token=`.

    Source: stable-diffusion-webui modules/textual_inversion; ComfyUI comfy/sd1_clip.py load_embed; diffusers
        loaders/textual_inversion.py.
    """
    if not job.file.header.tokens:
        raise ExportError("The adapter has no learned words.", ["leave out --format embeddings."])
    unread = [name for name in job.components.text_encoders if job.file.token_vectors(name) and _is_t5(job, name)]
    if unread:
        raise ExportError(
            "No program reads embeddings of T5.", [f"{', '.join(unread)} learned words; exact: --format merged."]
        )
    for word, name in file_names(job.file.header.tokens).items():
        tensors = {key: vectors.to(job.dtype).contiguous() for key, (_, vectors) in _keys(job, word).items()}
        entries = metadata.modelspec(job, kind="textual-inversion")
        entries |= {"modelspec.title": word, "modelspec.trigger_phrase": word, WORD: word}
        storage.write_safetensors(path / name, tensors, metadata.with_hashes(tensors, entries))
    return Outcome()


def check_words(job: Job, path: Path) -> tuple[float, int]:
    """Load every file as a diffusers user does; (largest absolute difference of a vector, number of words).

    Raises:
        ExportError: if a word is not known afterwards, or means something else.
    """
    worst = 0.0
    components = copy.copy(job.components)
    components.text_encoders = {name: copy.deepcopy(net) for name, net in job.components.text_encoders.items()}
    components.tokenizers = {name: copy.deepcopy(own) for name, own in job.components.tokenizers.items()}
    pipeline = build_pipeline(job.family, components)
    limit = torch.finfo(job.dtype).eps
    for word, name in file_names(job.file.header.tokens).items():
        tensors, _ = storage.read_safetensors(path / name)
        for key, (component, vectors) in _keys(job, word).items():
            encoder, tokenizer = components.text_encoders[component], components.tokenizers[component]
            pipeline.load_textual_inversion(
                {word: tensors[key]}, token=word, text_encoder=encoder, tokenizer=tokenizer
            )
            ids = tokenizer.convert_tokens_to_ids(names_of(word, len(vectors)))
            found = encoder.get_input_embeddings().weight.detach()[ids].float().cpu()
            difference = float((found - vectors).abs().max())
            worst = max(worst, difference)
            if not difference <= limit * float(vectors.abs().max()):
                raise ExportError(f"{word} was not kept: read back, its vectors differ by {difference:.2e}.")
    return worst, len(job.file.header.tokens)


def _keys(job: Job, word: str) -> dict[str, tuple[str, Tensor]]:
    """Name of the tensor -> (text encoder, vectors)."""
    known = {name: job.file.token_vectors(name).get(word) for name in job.components.text_encoders}
    found = {name: vectors.float().cpu() for name, vectors in known.items() if vectors is not None}
    networks = architecture(job).networks
    names = {name: networks[name].comfy.split(".")[1] for name in found}
    if len(job.family.text_encoders) == 1:
        names = dict.fromkeys(found, "emb_params")
    return {names[name]: (name, vectors) for name, vectors in found.items()}


def _is_t5(job: Job, component: str) -> bool:
    return component in job.family.t5_tokens
