"""An adapter of any make as one neutral value: what it does to each layer of its base, in this toolkit's own terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
            assert weight is not None or not self.needs_base, f"{self.method} needs the base's weight"
            zero = torch.zeros(self.own_shape()) if weight is None else weight
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

    def own_shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight as far as the tensors show it; a side that they leave open is 1.

        Raises:
            KeyError, IndexError, ValueError: if they make no update of the method.
        """
        return SHAPES.get(self.method, _lora_shape)(self.tensors)

    def problem(self) -> str:
        """Why the tensors make no update, as words that follow the layer's name; empty if they do.

        The method's own formula is tried on shapes alone, so it costs no arithmetic.
        """
        held = set(self.tensors) - {"diff_b"}
        layouts = LAYOUTS.get(self.method) or UPDATES[self.method].layouts
        if held not in layouts and layouts:
            return f"has parts that make no {self.method} together ({', '.join(sorted(held))})"
        if any(tensor.ndim == 0 or not tensor.numel() for name, tensor in self.tensors.items() if name != "alpha"):
            return "has a tensor without numbers or without a side"
        try:
            return self.misfit(self.own_shape())
        except (ValueError, KeyError, IndexError):
            return "has parts whose shapes do not go together"

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why this is no update of a weight of that shape, in the same way."""
        empty = {name: tensor.to("meta") for name, tensor in self.tensors.items() if name != "alpha"}
        own, bias = self.own_shape(), self.tensors.get("diff_b")
        try:
            change = replace(self, tensors=empty).delta(torch.empty(shape, device="meta"))
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"has parts whose shapes do not go together ({(str(error).splitlines() or [''])[0]})"
        found = tuple(change.shape) if "diff" in self.tensors or self.method != "diff" else shape
        rows = own[0] if own else 1
        if found != shape or rows not in (1, shape[0]) or (bias is not None and shape and bias.shape != shape[:1]):
            return f"changes a weight of {own}, and the layer's is {shape}"
        return ""


def _lora_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tensors["lora_B.weight"].shape[0], *tensors["lora_A.weight"].shape[1:]


def _whole_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    found = tensors.get("diff", tensors.get("weight"))
    return () if found is None else tuple(found.shape)


def _oft_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    blocks, upper = tensors["oft_R.weight"].shape
    return 1, blocks * round((1 + (1 + 8 * upper) ** 0.5) / 2)


def _boft_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    _, blocks, side, _ = tensors["boft_R"].shape
    return tensors["boft_s"].numel(), blocks * side


def _rotation_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    blocks, side = tensors["oft_blocks"].shape[-3:-1]
    return blocks * side, 1


def _hadamard_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    side = 1 if "hada_t1" in tensors else 0
    kernel = tensors["hada_t1"].shape[2:] if side else ()
    return tensors["hada_w1_a"].shape[side], tensors["hada_w1_b"].shape[1], *kernel


def _kronecker_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    left = tensors["lokr_w1"].shape if "lokr_w1" in tensors else (
        tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]
    )  # fmt: skip
    if "lokr_t2" in tensors:
        right = (tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1], *tensors["lokr_t2"].shape[2:])
    elif "lokr_w2" in tensors:
        right = tuple(tensors["lokr_w2"].shape)
    else:
        right = (tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1])
    return left[0] * right[0], left[1] * right[1], *right[2:]


SHAPES: dict[str, Callable[[Mapping[str, Tensor]], tuple[int, ...]]] = {
    "diff": _whole_shape,
    "full": _whole_shape,
    "ia3": lambda tensors: tuple(tensors["ia3_l"].shape),
    "oft": _oft_shape,
    "boft": _boft_shape,
    "diag-oft": _rotation_shape,
    "loha": _hadamard_shape,
    "lokr": _kronecker_shape,
}
"""Method -> the shape of a layer's weight as its tensors show it; all others are low-rank."""
LAYOUTS: dict[str, tuple[set[str], ...]] = {
    "diff": ({"diff"}, set()),
    "full": ({"weight"}, {"bias"}, {"weight", "bias"}),
    "diag-oft": tuple({"oft_blocks", *more} for more in ((), ("rescale",), ("alpha",), ("rescale", "alpha"))),
}
"""Method -> the sets of parts of which a layer must hold exactly one; those of other methods stand in UPDATES."""
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
        left_out: learned words that could not be read with it, in words.
        guessed: whether `architecture` is only the nearest by its names, because the base is of no published size.
    """

    updates: dict[Place, Update]
    architecture: Architecture
    metadata: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    dtype: torch.dtype = torch.float32
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    left_out: list[str] = field(default_factory=list)
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
        """The same adapter with other updates."""
        return replace(self, updates=updates)


def _rotate_outputs(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """LyCORIS' rotations of outputs: R W with R = (I + Q)(I - Q)^-1, Q = P - P^T, and then one gain per output.

    Blocks of shape (n, b, b) are the diagonal of one R^T (diag-oft); (m, n, b, b) are m such matrices one after the
    other, each between rows that are 2^i b / 2 apart (boft's butterfly). With a constraint (in `alpha`, per output), Q
    is shortened to it if its norm is larger.

    Source: KohakuBlueleaf/LyCORIS 3, modules/diag_oft.py and boft.py; Qiu et al. 2023, arXiv:2306.07280; Liu et al.
        2023, arXiv:2311.06243.
    """
    blocks = tensors["oft_blocks"].to(weight.dtype)
    skew = blocks - blocks.transpose(-1, -2)
    if float(tensors.get("alpha", torch.zeros(()))) > 0:
        size = skew.norm() + 1e-8
        limit = float(tensors["alpha"]) * weight.shape[0]
        skew = skew * (limit / size) if size > limit else skew
    one = torch.eye(blocks.shape[-1], dtype=weight.dtype, device=weight.device)
    rotation = (one + skew) @ torch.linalg.inv(one - skew)
    rows, side = weight.flatten(1), blocks.shape[-1]
    if blocks.ndim == 3:
        rows = rotation.transpose(1, 2) @ rows.reshape(-1, side, rows.shape[1])
    for number, stage in enumerate(rotation if blocks.ndim == 4 else ()):
        apart = 2**number * side // 2
        pairs = rows.reshape(-1, 2, apart, rows.shape[1]).transpose(1, 2)
        turned = stage @ pairs.reshape(-1, side, rows.shape[1])
        rows = turned.reshape(-1, apart, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
    rotated = rows.reshape(weight.shape)
    if "rescale" in tensors:
        rotated = rotated * tensors["rescale"].to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    return rotated
