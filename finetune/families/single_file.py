"""Networks from a single file in the original layout: built empty, then filled tensor by tensor, cast on the way.

Nothing of the file stays in memory but the weights themselves and one tensor at a time, so the peak is the size of the
networks in the number format that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from data_tools.errors import counted
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
AS_STORED = {
    torch.float16: torch.float16, torch.bfloat16: torch.bfloat16, torch.float8_e4m3fn: torch.float16,
    torch.float8_e5m2: torch.float16,
}  # fmt: skip
"""Number format of a file -> the narrowest one that holds its numbers exactly and computes; fp32 for all others."""
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
    """Fits empty networks to one file, keeps account of every tensor in it, and reads them when all is right."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._used: set[str] = set()
        self._places: list[tuple[nn.Module, Entry, list[Member], torch.dtype | None]] = []
        self._tied: list[Any] = []
        self.problems: list[str] = []
        """What does not fit, in words."""

    def fit(
        self, component: str, config: dict[str, Any], layout: Layout, dtype: torch.dtype | None, *, alone: bool
    ) -> nn.Module | None:
        """A network for the file's weights, in `dtype` (None: see AS_STORED), empty until `fill`; None if the file does
        not hold it.

        What is missing or does not fit goes to `problems`; nothing but the header is looked at.

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
        for name, members in stacks.items():
            entry = self._header.tensors.get(prefix + name)
            if members[0][0].form == IDENTITY:
                _, own, shape = members[0]
                _place(module, own, torch.eye(*shape), dtype)
            elif entry is not None:
                self._used.add(prefix + name)
                wanted = _file_shape(members)
                if entry.shape in wanted and entry.dtype in TORCH_DTYPES:
                    self._places.append((module, entry, members, dtype))
                else:
                    needed = f"this model needs {list(wanted[0])}"
                    self.problems.append(f"{prefix + name} is {entry.dtype} {list(entry.shape)}, {needed}")
            elif not {own for _, own, _ in members} <= tied:
                missing.append(prefix + name)
        if missing:
            self.problems.append(
                f"{component}: {counted(len(missing), 'tensor is', 'tensors are')} missing, e.g. "
                f"{', '.join(missing[:SHOWN])}"
            )
        if tied:
            self._tied.append(module)
        self._used |= {n for n in self._header.tensors if n.startswith(prefix) and surplus(n[len(prefix) :], settings)}
        return module

    def fill(self) -> None:
        """Read every tensor that has a place into the networks; only where there are no problems."""
        assert not self.problems, "the caller refuses what does not fit before a weight is read"
        with self._header.path.open("rb") as file:
            for place in self._places:
                self._fill_stack(file, *place)
        for module in self._tied:
            module.tie_weights()

    def _fill_stack(
        self, file: BinaryIO, module: nn.Module, entry: Entry, members: list[Member], dtype: torch.dtype | None
    ) -> None:
        """Put one tensor of the file where it belongs: one of ours, or several that stand on top of each other."""
        rows = [shape[0] if shape else 1 for _, _, shape in members]
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


def _place(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    path, _, leaf = name.rpartition(".")
    holder = module.get_submodule(path)
    # keep: transformers keeps a few layers of T5 in fp32 when the rest is fp16, which would overflow.
    kept: list[str] = getattr(module, "_keep_in_fp32_modules", None) or []
    wide = dtype in {torch.float16, None} and any(part in name.split(".") for part in kept)
    own = torch.float32 if wide else dtype or AS_STORED.get(tensor.dtype, torch.float32)
    cast = tensor.to(own) if tensor.is_floating_point() else tensor
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
        module = filler.fit(component, config, layout, dtype, alone=True)
        if module is not None and not filler.problems:
            filler.fill()
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

