"""A GPU that is not there: tensors say `device="cuda:0"`, and their content lies on the CPU, or nowhere.

Within `pretend_gpu()` everything that asks torch finds one CUDA device. A tensor on it is a `OnGpu`, which holds an
ordinary tensor and lets every operation run on that; an operation that mixes it with a CPU tensor raises, as CUDA does.
So the code under test takes its CUDA branches, and every number is what the CPU computes.

What it writes down: every place where the host waits for the device (`Gpu.waits`), every copy to the device from memory
that is not page-locked (`Gpu.unpinned`), and the most bytes that lived on it at once (`Gpu.peak`). With `content=False`
tensors hold nothing, so that a model of any size fits.

What it cannot show: kernels that are missing or wrong on CUDA, time, and what the driver and its libraries take.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
HOOKS = (2, 4)
"""Entries of at::CUDAHooksInterface's table of virtual functions: isBuilt and hasPrimaryContext."""
REAL_SUBCLASS = Tensor._make_subclass
REAL_DATA = Tensor.data
ROUNDED = 512
"""Bytes in which torch's CUDA allocator counts."""
MIXED = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip
"""Operations that take tensors of two devices on CUDA as well."""
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""Operations whose answer the host needs before it can go on."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `held` has its content."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Everything happens in `__new__`."""

    def tolist(self) -> Any:
        """See `Tensor.tolist`."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the GPU after the GPU was taken away")

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"


@functools.cache
def on_gpu(cls: type) -> type[OnGpu]:
    """The class of a tensor of class `cls` that is on the GPU; libraries have parameters of their own."""
    if issubclass(cls, OnGpu):
        return cls
    return OnGpu if cls is Tensor else type(cls.__name__, (cls, OnGpu), {"__init__": OnGpu.__init__, "plain": cls})


def exchange(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value` where either may be on the GPU: the object stays, with what Python knows of it."""
    known = {name: what for name, what in vars(tensor).items() if name != "held"}
    plain = getattr(type(tensor), "plain", Tensor if type(tensor) is OnGpu else type(tensor))
    if isinstance(value, OnGpu):
        new: Tensor = OnGpu.__new__(on_gpu(plain), value.held)
    else:
        new = REAL_SUBCLASS(plain, value.detach())
    new.requires_grad_(tensor.requires_grad)
    vars(new).update(known)
    gradient, tensor.grad = tensor.grad, None
    torch.clear_autocast_cache()  # it refers weakly to what it has cast, and such tensors are not swapped
    torch.utils.swap_tensors(tensor, new)
    if gradient is not None and gradient.dtype == tensor.dtype and gradient.device == tensor.device:
        tensor.grad = gradient


class Gpu(TorchDispatchMode):
    """Runs what happens on the GPU, and counts."""

    def __init__(self, *, content: bool) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.unpinned: list[str] = []
        self.now = self.peak = 0
        self._content = content
        self._pinned: set[int] = set()
        self._known: set[int] = set()

    def restart(self) -> None:
        """Count anew from here."""
        self.waits, self.unpinned, self.peak = [], [], self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, _ = tree_flatten((args, kwargs))
        here = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
        asked = kwargs.get("device")
        if not here and (asked is None or torch.device(asked).type != "cuda"):
            return func(*args, **kwargs)
        self._judge(func, leaves, here)
        if func in (aten._to_copy.default, aten.copy_.default):
            moved = self._moved(func, args, kwargs)
            if moved is not None:
                return moved
        leaving = asked is not None and torch.device(asked).type != "cuda"
        if asked is not None and not leaving:
            kwargs["device"] = torch.device("cpu" if self._content else "meta")
        kwargs.pop("pin_memory", None)
        owners = {id(tensor.held): tensor for tensor in here}
        inner = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
        if not self._content:
            inner = tree_map_only(Tensor, _without_content, inner)
        self._workspace(func, args)
        if func is aten._local_scalar_dense.default and not self._content:
            return here[0].dtype == torch.bool  # what is asked is finite, and no gradient overflowed
        out = func(*inner[0], **inner[1])
        return tree_map_only(
            Tensor, lambda tensor: owners[id(tensor)] if id(tensor) in owners else self._owned(tensor, leaving), out
        )

    def take(self, tensor: Tensor) -> OnGpu:
        """Count what `tensor` holds and put it on the GPU."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // ROUNDED) * ROUNDED
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, key, size)
        return OnGpu(tensor)

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked memory."""
        pinned = tensor.clone()
        self._pinned.add(pinned.untyped_storage()._cdata)
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether `pin` made it."""
        return not isinstance(tensor, OnGpu) and tensor.untyped_storage()._cdata in self._pinned

    def _owned(self, tensor: Tensor, leaving: bool) -> Tensor:
        return tensor if leaving else self.take(tensor)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _judge(self, func: Any, leaves: list[Any], here: list[OnGpu]) -> None:
        """Raise where CUDA would, and write down where the host waits."""
        strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnGpu) and x.device.type == "cpu"]
        if here and func not in MIXED and any(tensor.dim() for tensor in strangers):
            shapes = [tuple(tensor.shape) for tensor in strangers if tensor.dim()]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}: {shapes}"
            )
        indexing = func in MIXED - {aten.copy_.default, aten._to_copy.default}
        if func in WAITING or (indexing and any(x.dtype in (torch.bool, torch.uint8) for x in here[1:])):
            self.waits.append(f"{func} in {_where()}")
        elif indexing and any(tensor.dim() for tensor in strangers):
            self.unpinned.append(f"{func} in {_where()}")

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """A copy between the devices; None for one that stays on its side."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            to_gpu, from_gpu = isinstance(target, OnGpu), isinstance(source, OnGpu)
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source, target = args[0], None
            asked = torch.device(kwargs.get("device") or source.device)
            to_gpu, from_gpu = asked.type == "cuda", isinstance(source, OnGpu)
            blocking = not kwargs.get("non_blocking", False)
        if to_gpu == from_gpu:
            return None
        if from_gpu:
            self.waits.append(f"copy to the host in {_where()}")
        elif source.dim() and not (self.is_pinned(source) and not blocking):
            self.unpinned.append(f"{tuple(source.shape)} in {_where()}")
        raw = source.held if from_gpu else source
        if target is not None:
            (target.held if to_gpu else target).copy_(raw if self._content else _numbers(raw))
            return target
        return self._brought(raw, kwargs, to_gpu=to_gpu)

    def _brought(self, raw: Tensor, kwargs: dict[str, Any], *, to_gpu: bool) -> Tensor:
        kind = kwargs.get("dtype") or raw.dtype
        if self._content:
            copied = torch.empty_like(raw, dtype=kind).copy_(raw)
            return self.take(copied) if to_gpu else copied
        if to_gpu:
            return self.take(torch.empty_like(raw, dtype=kind, device="meta"))
        return _numbers(raw).to(kind)

    def _workspace(self, func: Any, args: Any) -> None:
        """What a kernel takes for itself while it runs: FlashAttention-2 sums the queries' gradient in fp32."""
        if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.peak = max(self.peak, self.now + args[1].numel() * 4)


def _numbers(raw: Tensor) -> Tensor:
    """Content for a tensor without any: ones, which are finite, as far as they fit."""
    if raw.device.type != "meta":
        return raw
    if raw.numel() > 2**23:
        return torch.empty_like(raw)
    return torch.ones(raw.shape, dtype=raw.dtype)


def _without_content(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" or not tensor.dim() else torch.empty_like(tensor, device="meta")


def _where() -> str:
    """The innermost lines of this project that are at work."""
    frames = [f for f in traceback.extract_stack() if "/finetune/" in f.filename and "site-packages" not in f.filename]
    return " < ".join(f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in reversed(frames[-3:])) or "a library"


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention that keeps what the memory-efficient kernels keep; without dropout, which this one does not know."""
    if torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        attn_mask = attn_mask.to(kind) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    assert query.device == key.device == value.device, f"{query.device}, {key.device}, {value.device}"
    assert query.dtype == key.dtype == value.dtype, f"{query.dtype}, {key.dtype}, {value.dtype}"
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    answer: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return answer


@contextlib.contextmanager
def pretend_gpu(*, bf16: bool = True, content: bool = True, memory: int = 16 * 2**30) -> Iterator[Gpu]:
    """One CUDA device for as long as the block runs.

    Args:
        bf16: whether it computes in bfloat16, as from Ampere on; a T4 does not.
        content: whether tensors on it have numbers.
        memory: bytes it has.
    """
    gpu = Gpu(content=content)
    real_compatible = torch._has_compatible_shallow_copy_type
    real_attention = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, *rest: Any, **settings: Any) -> Tensor:
        return (_attention if isinstance(query, OnGpu) else real_attention)(query, *rest, **settings)

    def subclass(cls: type, data: Tensor, requires_grad: bool = False, **settings: Any) -> Tensor:
        """A library's own class of tensors, on the GPU."""
        if not isinstance(data, OnGpu):
            made: Tensor = REAL_SUBCLASS(cls, data, requires_grad, **settings)
            return made
        return OnGpu.__new__(on_gpu(cls), data.held).requires_grad_(requires_grad)

    def get_data(tensor: Tensor) -> Tensor:
        return tensor.detach() if isinstance(tensor, OnGpu) else REAL_DATA.__get__(tensor)

    def set_data(tensor: Tensor, value: Tensor) -> None:
        if isinstance(tensor, OnGpu) or isinstance(value, OnGpu):
            exchange(tensor, value)
        else:
            REAL_DATA.__set__(tensor, value)

    answers: dict[str, Callable[..., Any]] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        "torch.cuda.get_device_name": lambda device=None: "NVIDIA A100" if bf16 else "Tesla T4",
        "torch.cuda.get_device_capability": lambda device=None: (8, 0) if bf16 else (7, 5),
        "torch.cuda.mem_get_info": lambda device=None: (memory - gpu.now, memory),
        "torch.cuda.max_memory_allocated": lambda device=None: gpu.peak,
        "torch.cuda.reset_peak_memory_stats": lambda device=None: gpu.restart(),
        "torch.cuda.memory_allocated": lambda device=None: gpu.now,
        "torch.cuda.synchronize": lambda device=None: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.manual_seed": lambda seed: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch._subclasses.fake_tensor.init_gpu_context": lambda device: None,
        "torch._has_compatible_shallow_copy_type": lambda tensor, other: (
            isinstance(tensor, OnGpu) or isinstance(other, OnGpu) or real_compatible(tensor, other)
        ),
        "torch.nn.functional.scaled_dot_product_attention": attention,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cuda_in_torch())
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, device=None: gpu.pin(tensor)))
        stack.enter_context(mock.patch.object(Tensor, "is_pinned", lambda tensor, device=None: gpu.is_pinned(tensor)))
        stack.enter_context(mock.patch.object(Tensor, "_make_subclass", staticmethod(subclass)))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mock.patch.object(Tensor, "data", property(get_data, set_data)))
        # keep: `torch.tensor(1, device="cuda")` otherwise copies where no dispatch mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        # keep: accelerate remembers the device of this process.
        AcceleratorState._reset_state(reset_partial_state=True)
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        stack.enter_context(gpu)
        yield gpu


@contextlib.contextmanager
def _cuda_in_torch() -> Iterator[None]:
    """Let torch's own code believe in a CUDA device: autograd and autocast ask in C++.

    A build without CUDA has no guard for its devices and hooks that deny them. torch itself puts a guard that does
    nothing in the place of one that counts no device, so it is shown one; and of the hooks' functions two say yes.
    """
    slots = (ctypes.c_void_p * 2).in_dll(_library("c10"), "_ZN3c104impl26device_guard_impl_registryE")
    zero, one = (ctypes.CFUNCTYPE(ctypes.c_int)(answer) for answer in (lambda: 0, lambda: 1))
    if slots[1] is None:
        table = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
        nobody = ctypes.c_void_p(ctypes.addressof(table))
        slots[1] = ctypes.addressof(nobody)
    torch._C._ensureCUDADeviceGuardSet()
    hooks = _library("torch_cpu")["_ZN2at6detail12getCUDAHooksEv"]
    hooks.restype = ctypes.c_void_p
    place = ctypes.c_void_p.from_address(hooks())
    kept = place.value
    functions = (ctypes.c_void_p * 48)(*(ctypes.c_void_p * 48).from_address(kept or 0))
    for number in HOOKS:
        functions[number] = ctypes.cast(one, ctypes.c_void_p).value
    place.value = ctypes.addressof(functions)
    try:
        yield
    finally:
        place.value = kept


def _library(name: str) -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(next(path for path in folder.iterdir() if path.name.startswith(f"lib{name}."))))
