"""How much memory a run needs, known without an accelerator.

A step is played on the meta device, where tensors have shapes and no content: every tensor that a forward and backward
pass creates is counted while it lives, so the peak is exact up to what an accelerator adds for itself (context, caches
of its allocator, workspaces of its kernels; about half a GB on CUDA). Attention counts as its memory-efficient kernels
do: queries, keys, values, the answer and one number per query, never the whole matrix. Where the base is held in 16
bits, the step is played as under autocast: norms compute in fp32, and every layer casts what it is given.
"""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from finetune.config import OptimizerConfig
from finetune.training.optimizer_state import state_bytes
from finetune.training.optimizers import build_optimizer

META = torch.device("meta")
CUDA_OVERHEAD = 500 * 2**20
"""What CUDA takes for itself, roughly: context and kernels."""


def resident_bytes() -> int:
    """What this process holds of main memory now; where the system does not say, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, by what they are for.

    Attributes:
        weights: the frozen networks that stay on the device.
        trained: what is trained, in its own number format.
        optimizer: its state.
        mean: the running mean, if there is one.
        step: the most that a forward and backward pass adds: activations and gradients.
    """

    weights: int
    trained: int
    optimizer: int
    mean: int
    step: int

    def total(self) -> int:
        """All together, at the peak."""
        return self.weights + self.trained + self.optimizer + self.mean + self.step


def predict(
    model: nn.Module, forward: Callable[[nn.Module], Tensor], config: OptimizerConfig, *, mean: bool
) -> Memory:
    """What a step of `model` needs.

    Args:
        model: with everything attached that is trained; it is left as it is.
        forward: runs one forward pass of a copy on the meta device and gives the loss, ().
        config: which optimizer.
        mean: whether a running mean is kept.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    own = sum(p.nbytes for p in trained)
    return Memory(
        weights=sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - own,
        trained=own,
        optimizer=optimizer_bytes(config, (tuple(p.shape) for p in trained)),
        mean=own if mean else 0,
        step=step_bytes(model, forward),
    )


def step_bytes(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> int:
    """The most bytes that live at once in a forward and backward pass, besides the parameters."""
    twin = on_meta(model)
    twin.train()
    with _Living((*twin.parameters(), *twin.buffers())) as living, _as_on_cuda(compute_dtype(model)):
        forward(twin).backward()
    return living.peak


def pass_bytes(model: nn.Module, forward: Callable[[nn.Module], Any]) -> int:
    """The most bytes that live at once in a forward pass without gradients, besides the parameters."""
    twin = on_meta(model).eval()
    there = (*twin.parameters(), *twin.buffers())
    with torch.no_grad(), _Living(there) as living, _as_on_cuda(compute_dtype(model)):
        forward(twin)
    return living.peak


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without content; nothing of the original is copied."""
    twins: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=META)
        twins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=META)
    return copy.deepcopy(model, twins)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What a network's layers compute in: the format of its frozen weights, where that is more than storage."""
    frozen = (p for p in model.parameters() if not p.requires_grad)
    counts = Counter(p.dtype for p in frozen if p.dtype.is_floating_point and p.dtype.itemsize > 1)
    return counts.most_common(1)[0][0] if counts else torch.float32


def optimizer_bytes(config: OptimizerConfig, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes of optimizer state: one real step with each shape that occurs, on the CPU."""
    total = 0
    for shape, count in Counter(shapes).items():
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.zeros_like(parameter)
        group = {"params": [parameter], "lr": config.learning_rate, "name": "one"}
        optimizer = build_optimizer(config, [group], torch.device("cpu")).optimizer
        optimizer.step()
        total += count * sum(state_bytes(optimizer).values())
    return total


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors made within the block, while they live; those given are there already."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there = [tensor.untyped_storage() for tensor in there]
        self._known = {storage._cdata for storage in self._there}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._take, out)
        return out

    def _take(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, key, storage.nbytes())
        return tensor

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextlib.contextmanager
def _as_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Attention with the memory of the kernels that accelerators have, for which torch would make the whole matrix on
    meta; and what autocast to `dtype` does, which meta does not have: layers cast their inputs, norms compute in fp32.

    The functions themselves are replaced: what gradient checkpointing computes again runs outside any function mode.
    """
    formats = {"linear": dtype, "conv2d": dtype, "group_norm": torch.float32, "layer_norm": torch.float32}
    real = {name: getattr(nn.functional, name) for name in (*formats, "scaled_dot_product_attention")}
    mixed = dtype != torch.float32
    played = {name: _casting(real[name], formats[name]) for name in formats} if mixed else {}
    played["scaled_dot_product_attention"] = _casting(_attention, dtype) if mixed else _attention
    try:
        for name, function in played.items():
            setattr(nn.functional, name, function)
        yield
    finally:
        for name, function in real.items():
            setattr(nn.functional, name, function)


def _casting(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def played(*arguments: Any, **named: Any) -> Tensor:
        return function(*map(cast, arguments), **{name: cast(value) for name, value in named.items()})

    return played


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Tensor:
    answer: Tensor = _Attention.apply(query, key, value)
    return answer


class _Attention(torch.autograd.Function):
    """Shapes and lifetimes of attention; no numbers."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The answer, and what the backward pass keeps."""
        answer = query.new_empty((*query.shape[:-1], value.shape[-1]))
        context.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return answer

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three inputs."""
        query, key, value, *_ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
