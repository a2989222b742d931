"""Tokenizer and text encoder of the embedded base: CLIP's own classes, at toy size."""

from __future__ import annotations

import json

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.demo.build.loop import initialise
from finetune.demo.scenes import RARE_WORDS, caption, random_scene

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
# Words beyond the captions that people may type; they are whole tokens, but untrained.
EXTRA_WORDS = (
    *("photo", "picture", "painting", "drawing", "style", "neon", "glowing", "and", "with", "of", "in", "near"),
    *("the", "cute", "lime", "magenta", "teal", "gold", "dog"),
)  # fmt: skip


def caption_corpus(count: int = 4000, seed: int = 3) -> list[str]:
    """Captions of the world, and the words that must become single tokens."""
    rng = np.random.default_rng(seed)
    captions = [caption(random_scene(rng, plain=0.3, mixed=0.3), rng) for _ in range(count)]
    return captions + [f"{word} {word}" for word in (*RARE_WORDS, *EXTRA_WORDS) for _ in range(200)]


def new_tokenizer() -> CLIPTokenizer:
    """Train byte-pair merges on the captions until every word is one token; anything else falls back to bytes."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=None))
    learner.normalizer = normalizers.Lowercase()
    pattern = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=50,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(caption_corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, specials.
    pieces = alphabet + [piece + "</w>" for piece in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH, pad_token=END)


def new_text_encoder(tokenizer: CLIPTokenizer, seed: int = 1, width: int = 128) -> CLIPTextModel:
    """A three-layer CLIP text encoder with fresh weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    initialise(encoder, torch.Generator().manual_seed(seed))
    return encoder
