"""What a lossy conversion costs, measured layer by layer and written into the file that cost it.

    | D_new - D | / | D |        (Frobenius norms; D is all that the adapter changes of a layer, its bias included)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from data_tools.errors import counted
from finetune.adapters.updates import merged_weight
from finetune.interchange.adapter import Adapter, InterchangeError, Place, Update
from finetune.interchange.layouts import LOSSES
from finetune.interchange.reading import shortened
from finetune.interchange.weights import Weights
from finetune.tracking import Reporter

NOTABLE = 1e-6
"""Share of the change below which nothing counts as lost: rounding to fp32 alone takes less."""


@dataclass(frozen=True)
class Loss:
    """What one approximation cost.

    Attributes:
        cause: what was done, or whose reading differs.
        layers: how many layers it concerns; exact ones are not counted.
        worst: largest relative error of a layer; 1 where its change is left out.
        mean: of the relative errors of these layers.
        total: relative error of all these changes taken together.
    """

    cause: str
    layers: int
    worst: float
    worst_layer: str
    mean: float
    total: float

    def row(self) -> tuple[str, str]:
        """For a table."""
        return (
            f"Lost, {self.cause}",
            f"worst {self.worst:.2%} ({self.worst_layer}), mean {self.mean:.2%} over {counted(self.layers, 'layer')}; "
            f"{self.total:.2%} of everything together",
        )


class Meter:
    """Sums over layers that become a `Loss`."""

    def __init__(self) -> None:
        self._relative: list[float] = []
        self._worst = (0.0, "")
        self._lost = self._whole = 0.0

    def add(self, place: Place, difference: float, size: float) -> None:
        """One layer: norm of the error, and norm of the change."""
        relative = difference / size if size else float(difference > 0)
        self._relative.append(relative)
        if relative >= self._worst[0]:
            self._worst = (relative, ".".join(place))
        self._lost, self._whole = self._lost + difference**2, self._whole + size**2

    def compare(self, place: Place, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """One layer: its true changes, and those that are left of them, of the same shapes."""
        pairs = zip(wanted, found, strict=True)
        lost = sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in pairs)
        self.add(place, math.sqrt(lost), math.sqrt(sum(float(tensor.double().square().sum()) for tensor in wanted)))

    def loss(self, cause: str) -> Loss:
        """The figures."""
        count = len(self._relative)
        total = math.sqrt(self._lost / self._whole) if self._whole else 0.0
        return Loss(cause, count, *self._worst, sum(self._relative) / max(1, count), total)


def noted(earlier: str, losses: Sequence[Loss], of: str = "") -> str:
    """The metadata entry for these losses after those that a file already told of.

    Args:
        of: name of the file that told of the earlier ones, where several come together.
    """
    try:
        before = json.loads(earlier) if earlier else []
    except (ValueError, RecursionError):
        before = [{"cause": "told by the source in words that cannot be read"}]
    before = before if isinstance(before, list) else [before]
    if of:
        before = [{"of": of, **note} if isinstance(note, dict) else {"of": of, "cause": str(note)} for note in before]
    rounded = [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in asdict(loss).items()}
        for loss in losses
    ]
    return json.dumps([*before, *rounded], ensure_ascii=False)


def dora_by_base_norm(update: Update, weight: Tensor) -> Tensor:
    """m (W + s B A) / |W|: the norm of each output's weights before the update instead of after it.

    Follows what is known of ComfyUI's `weight_decompose`; the program was not run.
    """
    moved = merged_weight("lora", update.tensors, weight, update.scale, update.options).flatten(1)
    magnitude = update.tensors["lora_magnitude_vector"].reshape(-1, 1)
    return (magnitude / weight.flatten(1).norm(dim=1, keepdim=True) * moved).reshape(weight.shape)


def dora_by_input_norm(update: Update, weight: Tensor) -> Tensor:
    """m (W + s B A) / |W + s B A|, the norm taken per input although there is a magnitude per output.

    Source: stable-diffusion-webui extensions-builtin/Lora/network.py, `apply_weight_decompose`; read, not run.
    """
    moved = merged_weight("lora", update.tensors, weight, update.scale, update.options)
    ones = [1] * (weight.ndim - 2)
    norm = moved.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *ones)
    return moved / norm * update.tensors["lora_magnitude_vector"].reshape(-1, 1, *ones)


DORA_READERS: dict[str, Callable[[Update, Tensor], Tensor]] = {
    "as ComfyUI and Forge read DoRA": dora_by_base_norm,
    "as A1111 and InvokeAI read DoRA": dora_by_input_norm,
}
"""Whose reading of LyCORIS' DoRA keys differs from LyCORIS' own -> the weight they arrive at."""


def reading_losses(adapter: Adapter, weights: Weights, reporter: Reporter) -> list[Loss]:
    """What other programs lose of the adapter's DoRA layers in a kohya file; nothing if it has none.

    Raises:
        InterchangeError: without a base, on whose weights the loss depends.
    """
    layers = {place: update for place, update in sorted(adapter.updates.items()) if update.method == "dora"}
    need_base(layers, weights)
    meters = {cause: Meter() for cause in DORA_READERS}
    with reporter.progress("Measuring the loss", len(layers)) as advance:
        for number, (place, update) in enumerate(layers.items()):
            weight = weights.weight(place)
            right = update.delta(weight)
            for cause, rule in DORA_READERS.items():
                meters[cause].compare(place, [right], [rule(update, weight) - weight])
            advance(number + 1, "")
    return [meter.loss(cause) for cause, meter in meters.items()] if layers else []


def need_base(updates: dict[Place, Update], weights: Weights) -> None:
    """Refuse to measure without the base what only the base can tell, and with one that is of other layers."""
    if weights.open and (misfits := weights.misfits({p: u for p, u in updates.items() if u.needs_base})):
        raise InterchangeError("The adapter does not fit the base.", shortened(misfits))
    if weights.open:
        return
    missing = [f"{'.'.join(place)} is {update.method}." for place, update in updates.items() if update.needs_base]
    if missing:
        raise InterchangeError(
            "What these updates do, and so what would be lost of them, depends on the base: give it with --base.",
            shortened(missing),
        )


def everything(update: Update, place: Place, weights: Weights) -> list[Tensor]:
    """All that an update changes of a layer: [change of its weight], and the change of its bias if there is one."""
    change = update.delta(weights.weight(place) if update.needs_base else None)
    bias = update.bias_delta(weights.bias(place) if update.needs_base else None)
    return [change, *([bias] if bias is not None else [])]


__all__ = [
    "DORA_READERS", "LOSSES", "NOTABLE", "Loss", "Meter", "dora_by_base_norm", "dora_by_input_norm", "everything",
    "need_base", "noted", "reading_losses",
]  # fmt: skip
