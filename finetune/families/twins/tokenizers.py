"""Tokenizers for tiny models: any lower-case ASCII text, mostly letter by letter."""

from __future__ import annotations

import string

from transformers import CLIPTokenizer, T5Tokenizer

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
MERGES = [("k", "s</w>"), ("s", "ks</w>"), ("t", "o"), ("to", "y</w>"), ("c", "at</w>"), ("a", "t</w>")]
CLIP_LENGTH = 77
T5_LENGTH = 24


def clip_tokenizer() -> CLIPTokenizer:
    """ "sks", "toy" and "cat" are one token each; reads 77 tokens."""
    pieces = list(LETTERS) + [f"{letter}</w>" for letter in LETTERS]
    pieces += ["".join(pair) for pair in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """One token per letter and per beginning of a word; a few whole words."""
    words = ["▁sks", "▁toy", "▁cat", "▁"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -2.0) for word in words)]
    pieces += [(letter, -5.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)
