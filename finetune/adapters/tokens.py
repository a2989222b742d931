"""Learned words: vectors of their own behind a text encoder's embedding table, which stays as it is to the bit.

PEFT's trainable tokens copy the whole table in every forward pass (150 MB for CLIP-L) and need it resized first;
here only the new rows exist, so nothing else can change. Several vectors per word are named as diffusers names
them ("<robot>", "<robot>_1", ...), so its pipelines spell a prompt's word out by themselves.

Source: Gal et al. 2022, Textual Inversion, arXiv:2208.01618.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from finetune.adapters.files import TOKENS
from finetune.errors import CheckpointError


@dataclass(frozen=True)
class WordTarget:
    """Words that one text encoder learns.

    Attributes:
        disk_prefix: the encoder's pipeline name.
        encoder: the network; its embedding is wrapped in place.
        tokenizer: its tokenizer, which already knows the words: see `add_words`.
        initial: word -> ordinary words to start from.
        vectors: word -> how many vectors it has.
        learning_rate: of the vectors.
        train_share: share of the run's steps after which they stay as they are.
        norm_pull: exponent of the pull to the vocabulary's mean length; see `config.tokens`.
    """

    disk_prefix: str
    encoder: nn.Module
    tokenizer: Any
    initial: Mapping[str, str]
    vectors: Mapping[str, int]
    learning_rate: float
    train_share: float = 1.0
    norm_pull: float = 0.0


class WordEmbedding(nn.Module):
    """An embedding table that knows further numbers, from `first` on.

    Args:
        base_layer: the table as it was; frozen.
        first: the first number that is not the table's.
        starts: one tensor (vectors, width) per word, in the order of their numbers.
    """

    def __init__(self, base_layer: nn.Module, first: int, starts: list[Tensor]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.first = first
        self.words = nn.ParameterList([nn.Parameter(start.clone().float()) for start in starts])
        self.register_buffer("starts", torch.cat(starts).float(), persistent=False)
        self.at_start = False

    @property
    def weight(self) -> Tensor:
        """The table as it was, without the words."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings of shape (*tokens.shape, width), in the table's number format."""
        new = tokens >= self.first
        # keep: no branch on `new`: a prompt without words must give their vectors a zero gradient, not none.
        known = self.base_layer(torch.where(new, 0, tokens))
        rows = self.starts if self.at_start else torch.cat(list(self.words))
        learned = nn.functional.embedding(torch.where(new, tokens - self.first, 0), rows)
        return torch.where(new.unsqueeze(-1), learned.to(known.dtype), known)


class Words:
    """The words one text encoder learns; see `parts.Part`. Disabled, they mean what they started from."""

    def __init__(self, target: WordTarget) -> None:
        """Wrap the encoder's embedding."""
        encoder: Any = target.encoder
        table = encoder.get_input_embeddings()
        first = target.tokenizer.convert_tokens_to_ids(next(iter(target.initial)))
        starts = [
            start_vectors(table, target.tokenizer, text, target.vectors[word]) for word, text in target.initial.items()
        ]
        self._target = target
        self._embedding = WordEmbedding(table, first, starts).to(table.weight.device)
        encoder.set_input_embeddings(self._embedding)
        self.train_share = target.train_share
        self.constants: dict[str, Tensor] = {}
        self.parameters = {
            f"{target.disk_prefix}.{TOKENS}.{i}": vectors for i, vectors in enumerate(self._embedding.words)
        }
        self._length = float(table.weight.detach().float().norm(dim=1).mean())

    def learning_rates(self) -> dict[str, float]:
        """See `parts.Part`."""
        return dict.fromkeys(self.parameters, self._target.learning_rate)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """See `parts.Part`."""
        self._embedding.at_start = True
        try:
            yield
        finally:
            self._embedding.at_start = False

    @torch.no_grad()
    def after_step(self) -> None:
        """Pull every vector's length towards the vocabulary's mean, if the run asks for it."""
        if self._target.norm_pull:
            for vectors in self.parameters.values():
                length = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
                vectors.mul_((self._length / length) ** self._target.norm_pull)

    def header(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `parts.Part`."""
        return {name: tensors[name] for name in self.parameters}, {"tokens": tuple(self._target.initial)}

    def unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing is packed."""
        return {}

    def describe(self) -> Iterator[tuple[str, str]]:
        """See `parts.Part`."""
        words = ", ".join(
            f"{word} ({self._target.vectors[word]} from {text!r})" for word, text in self._target.initial.items()
        )
        yield f"Words, {self._target.disk_prefix}", words


def names_of(word: str, vectors: int) -> list[str]:
    """What the vectors of a word are called in a tokenizer."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def add_words(tokenizer: Any, vectors: Mapping[str, int]) -> list[str]:
    """Teach a tokenizer words of several vectors each; what is in the way, in words.

    Their numbers follow each other from `len(tokenizer)` on, in the order of `vectors`.
    """
    names = [name for word, count in vectors.items() for name in names_of(word, count)]
    taken = [name for name in names if tokenizer.convert_tokens_to_ids(name) not in (None, tokenizer.unk_token_id)]
    taken = [name for name in taken if name in tokenizer.get_vocab()]
    if taken:
        return [f"tokens.words: {name} is a token of the base already; choose another word" for name in taken]
    tokenizer.add_tokens([AddedToken(name, single_word=False, normalized=True) for name in names])
    return []


def count_vectors(tokenizer: Any, text: str) -> int:
    """How many tokens ordinary words have."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def start_vectors(table: Any, tokenizer: Any, text: str, count: int) -> Tensor:
    """`count` vectors from ordinary words, (count, width), fp32.

    With more tokens than vectors each vector is the mean of its share of the tokens; with fewer they are repeated.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    rows = table.weight.detach()[ids.to(table.weight.device)].float()
    if len(rows) >= count:
        return torch.stack([share.mean(0) for share in rows.tensor_split(count)])
    return rows[torch.arange(count, device=rows.device) % len(rows)]


@contextlib.contextmanager
def words_applied(encoder: nn.Module, tokenizer: Any, words: Mapping[str, Tensor]) -> Iterator[Any]:
    """While the block runs the encoder knows `words`, word -> vectors (vectors, width); gives a tokenizer that does.

    Blocks may be nested. A word that an outer block has taught already is taken once if it means the same.

    Raises:
        CheckpointError: if the base's tokenizer has such a word, an outer block gave it another meaning, or vectors
            have another width than the base's embedding.
    """
    network: Any = encoder
    table, knowing = network.get_input_embeddings(), copy.deepcopy(tokenizer)
    width = table.weight.shape[1]
    problems = [
        f"{word} has vectors of {vectors.shape[1]} numbers, the base's embedding has {width}"
        for word, vectors in words.items()
        if vectors.shape[1] != width
    ]
    known = {word: same for word in words if not problems and (same := _known(table, tokenizer, word, words[word]))}
    problems += [f"{word} means one thing in one adapter and another in the next; give one of them only"
                 for word, same in known.items() if same == "other"]  # fmt: skip
    new = {word: vectors for word, vectors in words.items() if word not in known}
    problems += add_words(knowing, {word: len(vectors) for word, vectors in new.items()})
    if problems:
        raise CheckpointError("The learned words do not fit the base:", problems)
    if new:
        first = knowing.convert_tokens_to_ids(next(iter(new)))
        network.set_input_embeddings(WordEmbedding(table, first, list(new.values())).to(table.weight.device))
    try:
        yield knowing
    finally:
        network.set_input_embeddings(table)


@torch.no_grad()
def _known(table: nn.Module, tokenizer: Any, word: str, vectors: Tensor) -> str:
    """"same" or "other": what a word means that other files have taught already; empty if none has.

    Files of several number formats may hold the same word, so half precision's rounding does not count.
    """
    taught = tokenizer.get_vocab()
    inner, first = table, len(taught)
    while isinstance(inner, WordEmbedding):
        inner, first = inner.base_layer, inner.first
    if taught.get(word, -1) < first:
        return ""
    names = names_of(word, len(vectors) + 1)
    if names[-1] in taught or any(name not in taught for name in names[:-1]):
        return "other"
    ids = torch.tensor([taught[name] for name in names[:-1]], device=table.weight.device)
    difference = (table(ids).float().cpu() - vectors.float().cpu()).abs().max()
    rounding = max(2**-10, torch.finfo(table.weight.dtype).eps)
    return "same" if difference <= rounding * vectors.abs().max() else "other"
