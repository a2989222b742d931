"""An adapter of any make as one neutral value: what it does to each layer of its base, in this toolkit's own terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finetune.adapters.updates import UPDATES, merged_weight
from finetune.errors import UserError
from finetune.interchange.names import Architecture


class InterchangeError(UserError):
    """An adapter that cannot be had in the form asked for without losing something."""

    exit_code = 4


@dataclass(frozen=True)
class Update:
    """What an adapter does to one layer.

    Attributes:
        method: name in `adapters.updates.UPDATES`; or "diff", a change written out whole (`diff`, `diff_b`); or
            "diag-oft", LyCORIS' rotation of outputs (`oft_blocks`, `rescale`, `alpha` the constraint), which no
            other layout has. Any of them may bring a change of the bias, `diff_b`.
        tensors: fp32, under PEFT's suffixes.
        scale: what the update is multiplied by; 1 for methods without one.
        options: what the method needs besides; see `AdapterHeader.options`.
        shape: of the layer's weight; empty where it is not known. Factors of kernels may be flat.
    """

    method: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    options: Mapping[str, object] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    @property
    def rank(self) -> int | None:
        """Width of the update; None for methods without one."""
        if self.method in UPDATES and (shown := UPDATES[self.method].rank(self.tensors)):
            return shown
        for part in ("lokr_w1_b", "lokr_w2_b"):
            if part in self.tensors:
                return self.tensors[part].shape[0]
        return None

    @property
    def is_low_rank(self) -> bool:
        """Whether it is scale * B A and nothing else."""
        return self.method in ("lora", "locon", "rslora")

    @property
    def needs_base(self) -> bool:
        """Whether the change of the weight depends on the weight."""
        return self.method in ("dora", "oft", "boft", "ia3", "full", "diag-oft")

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change of the layer's weight.

        Args:
            weight: the base's; needed where `needs_base`.

        Returns:
            shape of the layer's weight, in fp32 or the format of `weight`; (out, in) where the shape is not known.
        """
        if self.method == "diff":
            change = self.tensors.get("diff", torch.zeros(()))
        elif self.is_low_rank:
            down, up = self.tensors["lora_A.weight"], self.tensors["lora_B.weight"]
            change = (up.flatten(1) @ (self.scale * down.flatten(1))).reshape(up.shape[0], *down.shape[1:])
        elif self.method == "diag-oft":
            assert weight is not None, "a rotation needs the weight that it rotates"
            change = _rotate_outputs(self.tensors, weight) - weight
        else:
            zero = self._zero() if weight is None else weight
            change = merged_weight(self.method, self.tensors, zero, self.scale, self.options) - zero
        shape = self.shape if weight is None else weight.shape
        whole = shape and change.numel() == math.prod(shape)
        return (change.reshape(shape) if whole else change).to(change.dtype if weight is None else weight.dtype)

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        """The change of the layer's bias; None if it is left alone."""
        if "diff_b" in self.tensors:
            return self.tensors["diff_b"]
        if self.method == "full" and "bias" in self.tensors and bias is not None:
            return self.tensors["bias"] - bias
        return None

    def _zero(self) -> Tensor:
        """A weight of the layer's shape, for methods whose change does not depend on it."""
        assert not self.needs_base, f"{self.method} needs the base's weight"
        tensors = self.tensors
        if self.method == "loha":
            if "hada_t1" in tensors:
                kernel = tensors["hada_t1"].shape[2:]
                return torch.zeros(tensors["hada_w1_a"].shape[1], tensors["hada_w1_b"].shape[1], *kernel)
            return torch.zeros(tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[1])
        left = tensors["lokr_w1"].shape if "lokr_w1" in tensors else (
            tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]
        )  # fmt: skip
        if "lokr_t2" in tensors:
            right = (tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1], *tensors["lokr_t2"].shape[2:])
        elif "lokr_w2" in tensors:
            right = tuple(tensors["lokr_w2"].shape)
        else:
            right = (tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1])
        return torch.zeros(left[0] * right[0], left[1] * right[1], *right[2:])


Place = tuple[str, str]
"""(component, layer): canonical names."""


@dataclass
class Adapter:
    """What an adapter does, layer by layer.

    Attributes:
        updates: place -> what is done there.
        architecture: names of the base.
        metadata: what the file said about itself.
        layout: how the file was spelled.
        dtype: the widest number format that the file held.
        tokens: learned word -> text encoder -> vectors of shape (vectors, width).
        candidates: families that the file fits equally well, if it says too little to choose between them.
        guessed: whether `architecture` is only the nearest by its names, because the base is of no published size.
    """

    updates: dict[Place, Update]
    architecture: Architecture
    metadata: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    dtype: torch.dtype = torch.float32
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    guessed: bool = False

    def methods(self) -> dict[str, set[str]]:
        """Component -> the methods of its layers."""
        found: dict[str, set[str]] = {}
        for (component, _), update in self.updates.items():
            found.setdefault(component, set()).add(update.method)
        return found

    def of(self, component: str) -> Iterator[tuple[str, Update]]:
        """(layer, update) of one network, in order of name."""
        yield from (
            (module, self.updates[owner, module]) for owner, module in sorted(self.updates) if owner == component
        )

    def components(self) -> list[str]:
        """The networks it changes, in order of name."""
        return sorted({component for component, _ in self.updates})

    def with_updates(self, updates: dict[Place, Update]) -> Adapter:
        """The same papers for other updates."""
        return replace(self, updates=updates)


def _rotate_outputs(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """LyCORIS' diag-oft: blocks of outputs are rotated, R = (I + Q)(I - Q)^-1 with Q = P - P^T, and then rescaled.

    With a constraint (in `alpha`, per output), Q is shortened to it if its norm is larger.

    Source: KohakuBlueleaf/LyCORIS 3, modules/diag_oft.py; Qiu et al. 2023, arXiv:2306.07280.
    """
    blocks = tensors["oft_blocks"].to(weight.dtype)
    skew = blocks - blocks.transpose(1, 2)
    if float(tensors.get("alpha", torch.zeros(()))) > 0:
        size = skew.norm() + 1e-8
        limit = float(tensors["alpha"]) * weight.shape[0]
        skew = skew * (limit / size) if size > limit else skew
    one = torch.eye(blocks.shape[1], dtype=weight.dtype)
    rotation = (one + skew) @ torch.linalg.inv(one - skew)
    split = weight.flatten(1).reshape(blocks.shape[0], blocks.shape[1], -1)
    rotated = torch.einsum("knm,knf->kmf", rotation, split).reshape(weight.shape)
    if "rescale" in tensors:
        rotated = rotated * tensors["rescale"].to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    return rotated
