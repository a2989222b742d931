"""From prompts to numbers: token ids, hidden layers of CLIP, T5, and how latents are packed into tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def clip_ids(tokenizer: Any, prompts: list[str], chunks: int) -> Tensor:
    """Token ids of `prompts`, shape (B, chunks * 77), int64.

    Each chunk is begin mark, up to 75 tokens, end mark, padding: so A1111 and ComfyUI read long prompts.
    """
    length = tokenizer.model_max_length
    if chunks == 1:
        found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids
    rows = []
    for ids in tokenizer(prompts, add_special_tokens=False, truncation=False, verbose=False).input_ids:
        row: list[int] = []
        for first in range(0, chunks * (length - 2), length - 2):
            part = [tokenizer.bos_token_id, *ids[first : first + length - 2], tokenizer.eos_token_id]
            row += part + [tokenizer.pad_token_id] * (length - len(part))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def t5_ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Token ids of `prompts`, shape (B, length), int64."""
    found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids


def clip_hidden(encoder: nn.Module, tokens: Tensor, layer: int, *, normed: bool) -> tuple[Tensor, Tensor]:
    """What a CLIP text encoder says of token ids.

    Args:
        tokens: shape (B, chunks * 77); every chunk is read by itself.
        layer: which hidden layer, counted from the end; 1 is the last.
        normed: whether the encoder's final layer norm is applied, as SD1 and SD2 do and the others do not.

    Returns:
        The hidden states, shape (B, chunks * 77, width), and the pooled output of the first chunk, shape (B, width of
        the projection), or of the end mark's last hidden state where the encoder has no projection.
    """
    batch, length = tokens.shape[0], _length(encoder)
    output: Any = encoder(tokens.reshape(-1, length), output_hidden_states=layer > 1 or not normed)
    if layer == 1 and normed:
        hidden = output.last_hidden_state
    else:
        hidden = output.hidden_states[-layer]
        hidden = _text_model(encoder).final_layer_norm(hidden) if normed else hidden
    pooled = getattr(output, "text_embeds", None)
    pooled = output.pooler_output if pooled is None else pooled
    return hidden.reshape(batch, -1, hidden.shape[-1]), pooled.reshape(batch, -1, pooled.shape[-1])[:, 0]


def is_empty(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """Which prompts are empty, shape (B,), bool: the end mark follows the begin mark at once."""
    return tokens[:, 1] == _text_model(encoder).eos_token_id


def unpack(latents: Tensor, height: int, width: int, side: int) -> Tensor:
    """Tokens of side x side latents, shape (B, h / side * w / side, C * side^2), as latents of shape (B, C, h, w)."""
    batch, _, channels = latents.shape
    square = latents.reshape(batch, height // side, width // side, channels // side**2, side, side)
    return square.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // side**2, height, width)


def pack(latents: Tensor, side: int) -> Tensor:
    """The inverse of `unpack`."""
    batch, channels, height, width = latents.shape
    square = latents.reshape(batch, channels, height // side, side, width // side, side)
    return square.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side**2)


def _text_model(encoder: nn.Module) -> Any:
    """The bare encoder: transformers wraps it only where there is a projection."""
    return getattr(encoder, "text_model", encoder)


def _length(encoder: nn.Module) -> int:
    config: Any = encoder.config
    return int(config.max_position_embeddings)
