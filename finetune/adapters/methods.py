"""Adapter methods: what is put beside a frozen layer. To add one, write its function and name it in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, PeftConfig


@dataclass(frozen=True)
class Shape:
    """How large an adapter is and where it goes.

    Attributes:
        rank: width of the low-rank update.
        alpha: the update is scaled by alpha / rank.
        dropout: share of adapter inputs zeroed in training.
        pattern: regular expression that the whole dotted name of a layer must match.
    """

    rank: int
    alpha: float
    dropout: float
    pattern: str

    @property
    def scale(self) -> float:
        """What B A is multiplied by when it is added to the layer."""
        return self.alpha / self.rank


def lora(shape: Shape) -> PeftConfig:
    """W + (alpha / rank) B A with B zero at the start. Source: Hu et al. 2021, LoRA, arXiv:2106.09685."""
    return LoraConfig(
        r=shape.rank,
        # keep: PEFT types alpha as int but only divides by it; a fraction is as good.
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.pattern,
        bias="none",
    )


METHODS: dict[str, Callable[[Shape], PeftConfig]] = {"lora": lora}
