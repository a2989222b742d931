"""What the pieces of an adapter set have in common: layers beside frozen ones, whole weights, learned words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from finetune.adapters.layers import LayerPlan
from finetune.adapters.methods import Shape


@dataclass(frozen=True)
class Target:
    """One network whose layers are changed.

    Attributes:
        disk_prefix: first part of its parameters' names on disk, e.g. "unet" or "text_encoder".
        module: the network; its layers are replaced in place.
        method: a name in METHODS.
        shape: size of the adapter.
        layers: installed layer name -> its plan.
        disk_name: from a layer's name as installed to its canonical name on disk.
        train_share: share of the run's steps after which it stays as it is.
    """

    disk_prefix: str
    module: nn.Module
    method: str
    shape: Shape
    layers: dict[str, LayerPlan]
    disk_name: Callable[[str], str]
    train_share: float = 1.0


class Part(Protocol):
    """A piece of an adapter set: parameters that belong to one network and are trained together."""

    parameters: dict[str, nn.Parameter]
    """Canonical name -> parameter, fp32."""
    constants: dict[str, Tensor]
    """Canonical name -> what the parameters mean nothing without, though it is not trained."""
    train_share: float
    """Share of the run's steps after which it stays as it is."""

    def learning_rates(self) -> dict[str, float]:
        """Canonical name -> learning rate."""

    def disabled(self) -> AbstractContextManager[None]:
        """The network as it was, for as long as the context lasts."""

    def after_step(self) -> None:
        """What is done to the parameters after each optimizer step."""

    def header(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """From trained tensors to those a file holds, and this part's fields of the header."""

    def unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where `header` packed parameters and constants together: both again, from a file's tensors."""

    def describe(self) -> Iterator[tuple[str, str]]:
        """(what, in words) for the plan."""
