"""Emphasis in prompts: "a (red:1.3) hat" makes CLIP say red louder, as in A1111.

`(word)` is 1.1 times, `[word]` a 1.1th, `(word:1.5)` 1.5 times; they nest and multiply; a backslash makes a bracket
plain.
Source: the syntax of AUTOMATIC1111/stable-diffusion-webui, wiki page "Features", section "Attention/emphasis".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.families.text import spelled_out

STEP = 1.1
_PIECES = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\)|\]|[^\\()\[\]:]+|[\\:]")


def parse(prompt: str) -> list[tuple[str, float]]:
    """Pieces of a prompt with their weights, in order; neighbours of one weight are joined.

    A bracket that is never closed holds to the end of the prompt, as in A1111; one that closes nothing is plain text.
    """
    pieces: list[list[Any]] = []
    rounds: list[int] = []
    squares: list[int] = []

    def multiply(first: int, factor: float) -> None:
        for piece in pieces[first:]:
            piece[1] *= factor

    for found in _PIECES.finditer(prompt):
        text = found.group()
        if text == "(":
            rounds.append(len(pieces))
        elif text == "[":
            squares.append(len(pieces))
        elif text.endswith(")") and text[0] == ":" and rounds:
            multiply(rounds.pop(), float(text[1:-1]))
        elif text == ")" and rounds:
            multiply(rounds.pop(), STEP)
        elif text == "]" and squares:
            multiply(squares.pop(), 1 / STEP)
        else:
            pieces.append([text[1:] if len(text) == 2 and text[0] == "\\" else text, 1.0])
    for first in rounds:
        multiply(first, STEP)
    for first in squares:
        multiply(first, 1 / STEP)
    return list(_joined(pieces))


def _joined(pieces: list[list[Any]]) -> Iterator[tuple[str, float]]:
    text, weight = "", 1.0
    for piece, own in pieces:
        if text and own != weight:
            yield text, weight
            text = ""
        text, weight = text + piece, own
    if text:
        yield text, weight


def plain(prompt: str) -> str:
    """The prompt without its marks of emphasis."""
    return "".join(text for text, _ in parse(prompt))


def weights(prompt: str, tokenizer: Any, length: int) -> Tensor | None:
    """One factor per token of a CLIP prompt, (length,), fp32; None if nothing is emphasised.

    Args:
        length: how many tokens the encoder reads: a multiple of the tokenizer's own length for prompts in chunks.

    Raises:
        ConfigError: if a mark of emphasis ends inside a word, so that it belongs to no token.
    """
    parts = parse(prompt)
    if all(weight == 1.0 for _, weight in parts):
        return None
    ids: list[int] = []
    factors: list[float] = []
    for text, weight in parts:
        (spelled,) = spelled_out(tokenizer, [text])
        own = tokenizer(spelled, add_special_tokens=False, verbose=False).input_ids
        ids += own
        factors += [weight] * len(own)
    (whole,) = spelled_out(tokenizer, [plain(prompt)])
    if ids != list(tokenizer(whole, add_special_tokens=False, verbose=False).input_ids):
        raise ConfigError(
            f"The emphasis in {prompt!r} begins or ends inside a word; put whole words into the brackets."
        )
    window = int(tokenizer.model_max_length)
    row = torch.ones(length)
    for i, factor in enumerate(factors[: length // window * (window - 2)]):
        chunk, place = divmod(i, window - 2)
        row[chunk * window + 1 + place] = factor
    return row


def emphasise(states: Tensor, factors: Tensor) -> Tensor:
    """Encoded tokens (B, length, width) times their factors (B, length), each prompt's mean kept as it was."""
    louder = states * factors[..., None].to(states)
    before, after = states.mean(dim=(1, 2), keepdim=True), louder.mean(dim=(1, 2), keepdim=True)
    # keep: without the mean kept, a single factor changes how strongly the whole prompt is followed.
    scale = torch.where(after.abs() > torch.finfo(after.dtype).tiny, before / after, torch.ones_like(after))
    return louder * scale
