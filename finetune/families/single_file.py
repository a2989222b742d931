"""Networks from a single file in the original layout: built empty, then filled tensor by tensor, cast on the way.

Nothing of the file stays in memory but the weights themselves and one tensor at a time, so the peak is the size of the
networks in the number format that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.families import skeleton
from finetune.families.original_keys import IDENTITY, INWARDS, Layout, Place, config_of
from finetune.families.original_keys.clip import plain, surplus
from finetune.families.text import canonical
from finetune.header import Entry, Header

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip
"""Number formats of weights in a file."""
OF_NO_USE = re.compile(
    r"model_ema\.|.*position_ids$|.*logit_scale$|v_pred$|ztsnr$|loss\.|denoiser\.|first_stage_model\.loss\."
    r"|(betas|alphas|sqrt_|log_|posterior_|logvar|lvlb|scale_factor|embedding_manager).*|.*\.text_projection(\.weight)?$"
    r"|cond_stage_model\.logit_scale"
)
"""Names that published files hold and no network here reads: averages, buffers of the sampler, unused projections."""
SHOWN = 6
"""At most so many names of one kind are listed."""
DIFFUSERS_OWN = Layout(plain, ("",))
"""The layout of a network's own file in a diffusers folder."""


class Filler:
    """Fills empty networks from one file and keeps account of every tensor in it."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._used: set[str] = set()
        self.problems: list[str] = []
        """What does not fit, in words."""

    def fill(
        self, component: str, config: dict[str, Any], layout: Layout, dtype: torch.dtype, *, alone: bool
    ) -> nn.Module | None:
        """A network with the file's weights, in `dtype`; None if the file does not hold it.

        What is missing or does not fit goes to `problems`.

        Args:
            alone: whether the file may hold nothing but this network, so that its names begin with nothing.
        """
        module = skeleton.empty_network(config)
        settings = config_of(module)
        stacks = _stacks(module, component, layout, settings)
        prefixes = [prefix for prefix in layout.prefixes if prefix or alone]
        prefix = next((p for p in prefixes if any(p + name in self._header.tensors for name in stacks)), None)
        if prefix is None:
            return None
        tied = set(getattr(module, "_tied_weights_keys", None) or ())
        missing: list[str] = []
        with self._header.path.open("rb") as file:
            for name, members in stacks.items():
                entry = self._header.tensors.get(prefix + name)
                if members[0][0].form == IDENTITY:
                    _, own, shape = members[0]
                    _place(module, own, torch.eye(*shape), dtype)
                elif entry is not None:
                    self._used.add(prefix + name)
                    self._fill_stack(module, file, prefix + name, entry, members, dtype)
                elif not {own for _, own, _ in members} <= tied:
                    missing.append(prefix + name)
        if missing:
            self.problems.append(
                f"{component}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:SHOWN])}"
            )
        if tied:
            cast(Any, module).tie_weights()
        self._used |= {n for n in self._header.tensors if n.startswith(prefix) and surplus(n[len(prefix) :], settings)}
        return module

    def _fill_stack(
        self, module: nn.Module, file: BinaryIO, name: str, entry: Entry, members: list[Member], dtype: torch.dtype
    ) -> None:
        """Put one tensor of the file where it belongs: one of ours, or several that stand on top of each other."""
        rows = [shape[0] if shape else 1 for _, _, shape in members]
        wanted = _file_shape(members)
        if entry.shape not in wanted or entry.dtype not in TORCH_DTYPES:
            self.problems.append(f"{name} is {entry.dtype} {list(entry.shape)}, this model needs {list(wanted[0])}")
            return
        bytes_per_row = entry.size // max(sum(rows), 1)
        start = self._header.offset + entry.start
        for (place, own, shape), count in zip(members, rows, strict=True):
            size = bytes_per_row * count if len(members) > 1 else entry.size
            stored = (count, *entry.shape[1:]) if len(members) > 1 else entry.shape
            tensor = INWARDS[place.form](_read(file, start, size, TORCH_DTYPES[entry.dtype], stored))
            assert tuple(tensor.shape) == shape, f"{own}: {tuple(tensor.shape)} is not {shape}"
            _place(module, own, tensor, dtype)
            start += size

    @property
    def read(self) -> int:
        """How many of the file's tensors found their place."""
        return len(self._used)

    def skip(self, layout: Layout) -> None:
        """Count a network as read: the user takes it from elsewhere."""
        prefixes = tuple(prefix for prefix in layout.prefixes if prefix)
        self._used |= {name for name in self._header.tensors if name.startswith(prefixes)}

    def leftovers(self) -> list[str]:
        """Tensors that nothing read, and that are not known to be of no use."""
        return sorted(name for name in self._header.tensors if name not in self._used and not OF_NO_USE.match(name))


Member = tuple[Place, str, tuple[int, ...]]
"""(where it stands, our name as installed, our shape)."""


def _stacks(
    module: nn.Module, component: str, layout: Layout, settings: Mapping[str, Any]
) -> dict[str, list[Member]]:
    """Name in the file -> those of our tensors that it holds, from top to bottom."""
    found: dict[str, list[Member]] = {}
    for own, tensor in module.state_dict().items():
        place = layout.naming(canonical(module, component, own), settings)
        found.setdefault(place.name, []).append((place, own, tuple(tensor.shape)))
    return {name: sorted(members, key=lambda member: member[0].part) for name, members in found.items()}


def _file_shape(members: list[Member]) -> list[tuple[int, ...]]:
    """The shapes a file may give a tensor."""
    place, _, shape = members[0]
    if len(members) > 1:
        return [(sum(own[0] for _, _, own in members), *shape[1:])]
    if place.form == "transposed":
        return [shape[::-1]]
    return [(*shape, 1, 1), shape] if place.form == "convolution" and len(shape) == 2 else [shape]


def _read(file: BinaryIO, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Some rows of a tensor, straight from the file into their own memory."""
    if not size:
        return torch.empty(shape, dtype=dtype)
    buffer = torch.empty(size, dtype=torch.uint8)
    file.seek(start)
    got = file.readinto(memoryview(buffer.numpy()))  # type: ignore[attr-defined]
    assert got == size, "the header was checked against the file's size"
    return buffer.view(dtype).reshape(shape)


def _place(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    holder = module.get_submodule(path)
    # keep: transformers keeps a few layers of T5 in fp32 when the rest is fp16, which would overflow.
    kept: list[str] = getattr(module, "_keep_in_fp32_modules", None) or []
    wide = dtype == torch.float16 and any(part in name.split(".") for part in kept)
    cast = tensor.to(torch.float32 if wide else dtype) if tensor.is_floating_point() else tensor
    if leaf in holder._parameters:
        holder._parameters[leaf] = nn.Parameter(cast.contiguous(), requires_grad=False)
    else:
        holder._buffers[leaf] = cast.contiguous()


def part_from_file(
    header: Header, component: str, config: dict[str, Any], layouts: list[Layout], dtype: torch.dtype
) -> nn.Module:
    """One network from a file of its own, in the first of `layouts` that fits.

    Raises:
        ConfigError: if the file does not hold that network, naming every tensor that does not fit.
    """
    tried = []
    for layout in layouts:
        filler = Filler(header)
        module = filler.fill(component, config, layout, dtype, alone=True)
        if module is not None and not filler.problems:
            return module
        tried += [filler] if module is not None else []
    if tried:
        nearest = max(tried, key=lambda filler: filler.read)
        raise ConfigError(f"{header.path.name} does not fit this base as its {component}:", nearest.problems)
    raise ConfigError(
        f"{header.path.name} holds no {component} for this base: its names, such as "
        f"{', '.join(list(header.tensors)[:3])}, are those of no layout known here."
    )


def part_digest(file_digest: str, component: str, config: Mapping[str, Any]) -> str:
    """SHA-256 for one network of a file: the file's own, the network's name and its configuration."""
    text = json.dumps([file_digest, component, config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

