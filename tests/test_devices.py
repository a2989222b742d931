"""Networks whose turn is over give their memory back."""

from __future__ import annotations

from torch import nn

from finetune.devices import let_go
from finetune.training.memory import resident_bytes


def test_what_is_let_go_takes_no_memory() -> None:
    """Training ends where the export loads the base again; both at once do not fit a machine that holds just one."""
    layers = [nn.Linear(256, 256) for _ in range(1000)]
    held = resident_bytes()
    let_go(layers)
    assert held - resident_bytes() > 0.9 * 1000 * 256 * 256 * 4
    assert all(layer.weight.shape == (256, 256) and layer.weight.is_meta for layer in layers)
