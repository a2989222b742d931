"""The price of an error, element by element, and its average over one picture.

Each loss gets (prediction, target, delta), the first two of one shape and in float32, and returns that shape.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mse(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """(prediction - target)^2."""
    return (prediction - target) ** 2


def l1(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """|prediction - target|."""
    return (prediction - target).abs()


def huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Pseudo-Huber 2 delta (sqrt(d^2 + delta^2) - delta): d^2 for small errors d, 2 delta |d| for large ones.

    Its small errors cost what they cost under `mse`, so the learning rate may stay.

    Source: Khrapov et al. 2024, arXiv:2403.16728; the same formula as `conditional_loss` in sd-scripts.
    """
    return delta * smooth_l1(prediction, target, delta)


def smooth_l1(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """2 (sqrt(d^2 + delta^2) - delta): d^2 / delta for small errors d, 2 |d| for large ones.

    Source: as for `huber`.
    """
    # The difference of roots as a quotient: exact where d is far below delta, where subtracting would cancel.
    squared = (prediction - target) ** 2
    return 2 * squared / ((squared + delta**2).sqrt() + delta)


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "smooth_l1": smooth_l1,
}


def mean_per_picture(errors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average errors of shape (B, C, h, w) to shape (B,).

    Args:
        mask: how much each place counts, in [0, 1], broadcasting to `errors`, usually (B, 1, h, w). The
            average is taken over the masked-in area, so a picture with a small mask counts as much as any
            other. An empty mask gives 0.
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    mask = mask.to(errors.dtype).expand_as(errors)
    return (errors * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-8)
