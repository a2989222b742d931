"""Feed the tools for strangers' adapters files that are whole but wrong; every answer must be a result or words.

    python -m tests.campaigns.fuzz_adapters --minutes 5 [--seed 0]

Each file is a sound adapter of a tiny base in one of several layouts and methods, with some accidents: shapes, ranks,
missing and doubled parts, alphas that are no numbers, number formats, names. It then goes through inspect, convert,
merge, merge into a base, resize and diff. A refusal must leave no file behind, and a file that was written must be
read back. Anything else is printed with the accidents and ends the campaign with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.families.twins import write_twin
from finetune.interchange.commands import convert_adapter, merge_adapters, merge_into_base, resize_adapter
from finetune.interchange.comparing import diff_adapters
from finetune.interchange.inspection import inspect_file
from finetune.interchange.names import table_of
from finetune.interchange.reading import read_adapter

FORMATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
ALPHAS = [float("nan"), float("inf"), -float("inf"), 0.0, -2.0, 1e30, 1e-30, 3.0]
NAMES = ["ä", "\U0001f600", "a b", "..", "lora_unet", "", "lora_unet_\u202e", "x" * 300, "model.diffusion_model.a"]
LEAST, MOST = 0, 3
"""Accidents of one file."""
TRIED = 4
"""Tools that one file goes through."""
Document = dict[str, Tensor]


def sound(chance: random.Random, layers: list[tuple[str, tuple[int, ...]]]) -> Document:
    """A file that every tool takes: some layers of one method, in one layout."""
    method = chance.choice(list(METHODS))
    spell = chance.choice(list(SPELLINGS)) if method in ("lora", "dora") else _kohya
    chosen = [layer for layer in layers if METHODS[method][0](layer[1])]
    found: Document = {}
    for name, shape in chance.sample(chosen, min(len(chosen), chance.randint(1, 6))):
        parts = METHODS[method][1](chance, shape)
        found |= {spell(name, part): tensor for part, tensor in parts.items()}
    return found


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.1


def _lora(chance: random.Random, shape: tuple[int, ...]) -> Document:
    rank, ones = chance.choice((1, 2, 4)), [1] * (len(shape) - 2)
    return {"lora_down.weight": _noise(rank, *shape[1:]), "lora_up.weight": _noise(shape[0], rank, *ones),
            "alpha": torch.tensor(2.0)}  # fmt: skip


def _dora(chance: random.Random, shape: tuple[int, ...]) -> Document:
    return {**_lora(chance, shape), "dora_scale": 1 + _noise(shape[0], *[1] * (len(shape) - 1))}


def _loha(chance: random.Random, shape: tuple[int, ...]) -> Document:
    wide = torch.Size(shape[1:]).numel()
    return {**{f"hada_w{i}_a": _noise(shape[0], 2) for i in (1, 2)},
            **{f"hada_w{i}_b": _noise(2, wide) for i in (1, 2)}, "alpha": torch.tensor(1.0)}  # fmt: skip


def _lokr(chance: random.Random, shape: tuple[int, ...]) -> Document:
    return {"lokr_w1": _noise(2, 2), "lokr_w2_a": _noise(shape[0] // 2, 2), "lokr_w2_b": _noise(2, shape[1] // 2),
            "alpha": torch.tensor(1.0)}  # fmt: skip


def _any(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def _even(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(side % 8 == 0 for side in shape)


METHODS: dict[str, tuple[Callable[[tuple[int, ...]], bool], Callable[[random.Random, tuple[int, ...]], Document]]] = {
    "lora": (_any, _lora),
    "dora": (_any, _dora),
    "loha": (_any, _loha),
    "lokr": (_even, _lokr),
    "diff": (lambda shape: True, lambda chance, shape: {"diff": _noise(*shape), "diff_b": _noise(shape[0])}),
    "ia3": (_even, lambda chance, shape: {"weight": _noise(shape[1]), "on_input": torch.tensor(True)}),
    "diag-oft": (_even, lambda chance, shape: {"oft_blocks": _noise(shape[0] // 8, 8, 8), "alpha": torch.tensor(0.0)}),
    "boft": (_even, lambda chance, shape: {"oft_blocks": _noise(2, shape[0] // 4, 4, 4), "rescale": _noise(shape[0])}),
    "glora": (_even, lambda chance, shape: {f"{x}{i}.weight": _noise(4, 4) for x in "ab" for i in (1, 2)}),
}
"""Method -> (which layers can have it, its tensors by kohya's endings)."""


def _kohya(name: str, part: str) -> str:
    return f"lora_unet_{name}.{part}".replace(".", "_", name.count("."))


def _diffusers(name: str, part: str) -> str:
    leaf = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return f"unet.{name}.{leaf.get(part, {'dora_scale': 'lora_magnitude_vector'}.get(part, part))}"


SPELLINGS = (_kohya, _diffusers)


def damaged(chance: random.Random, tensors: Document, other: Document) -> tuple[Document, list[str]]:
    """A file after some accidents, and their names."""
    found, told = dict(tensors), []
    for _ in range(chance.randint(LEAST, MOST)):
        kind = chance.choice(list(ACCIDENTS))
        if found:
            ACCIDENTS[kind](chance, found, other, chance.choice(list(found)))
            told.append(kind)
    return found, told


def _shape(chance: random.Random, found: Document, other: Document, name: str) -> None:
    shape = list(found[name].shape)
    move = chance.randrange(5)
    if move == 0 and shape:
        shape[chance.randrange(len(shape))] = chance.choice((0, 1, 3, 7, 64))
    elif move == 1:
        shape.append(chance.choice((0, 1, 2)))
    elif move == 2:
        shape = shape[1:]
    elif move == 3:
        shape = shape[::-1]
    else:
        shape = []
    found[name] = _noise(*shape) if shape else torch.tensor(0.5)


def _values(chance: random.Random, found: Document, other: Document, name: str) -> None:
    value = chance.choice((float("nan"), float("inf"), 0.0, 1e30, 1e-38))
    found[name] = torch.full_like(found[name].float(), value)


def _format(chance: random.Random, found: Document, other: Document, name: str) -> None:
    for key in [name] if chance.random() < 0.5 else list(found):
        found[key] = found[key].float().to(FORMATS[chance.choice(list(FORMATS))])


def _alpha(chance: random.Random, found: Document, other: Document, name: str) -> None:
    stem = name.split(".", maxsplit=1)[0] if name.startswith("lora_unet") else name.rsplit(".", 2)[0]
    value = torch.tensor(chance.choice(ALPHAS))
    found[f"{stem}.alpha"] = value if chance.random() < 0.8 else value.repeat(chance.choice((0, 1, 2)))


def _missing(chance: random.Random, found: Document, other: Document, name: str) -> None:
    del found[name]


def _twice(chance: random.Random, found: Document, other: Document, name: str) -> None:
    again = name.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
    found[again if again != name else f"{name}.weight"] = found[name].clone()


def _mixed(chance: random.Random, found: Document, other: Document, name: str) -> None:
    found.update(other)


def _renamed(chance: random.Random, found: Document, other: Document, name: str) -> None:
    odd = chance.choice(NAMES)
    new = odd + name if chance.random() < 0.5 else f"{odd}.{name.rsplit('.', 2)[-2]}.weight"
    found[new] = found.pop(name)


def _rank(chance: random.Random, found: Document, other: Document, name: str) -> None:
    rank = chance.choice((0, 1, 300))
    for key, tensor in list(found.items()):
        if key.endswith(("lora_down.weight", "lora_A.weight")) and tensor.ndim > 1:
            found[key] = _noise(rank, *tensor.shape[1:])
        elif key.endswith(("lora_up.weight", "lora_B.weight")) and tensor.ndim > 1:
            found[key] = _noise(tensor.shape[0], rank, *tensor.shape[2:])


ACCIDENTS = {
    "shape": _shape, "values": _values, "format": _format, "alpha": _alpha, "missing": _missing, "twice": _twice,
    "mixed": _mixed, "renamed": _renamed, "rank": _rank,
}  # fmt: skip


def save(tensors: Document, path: Path) -> None:
    """Written by hand, because the library refuses some of it."""
    names = {dtype: name for name, dtype in FORMATS.items()}
    header, body = {}, b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def main() -> int:
    """Run until the time is over or something is neither a result nor words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    # keep: the library tells of divisions by zero that are refused a moment later.
    warnings.simplefilter("ignore")
    torch.manual_seed(asked.seed)
    chance, counts, end = random.Random(asked.seed), Counter[str](), time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory() as work:
        base = write_twin("sd1", Path(work) / "base")
        table = table_of(base)
        assert table is not None, "a folder names its layers"
        layers = [(name, shape) for name, shape in table.networks["unet"].layers.items() if shape]
        while time.monotonic() < end:
            tensors, told = damaged(chance, sound(chance, layers), sound(chance, layers))
            folder = Path(work) / "case"
            if not case(chance, folder, base, tensors, counts):
                sys.stdout.write(f"after {counts.total()} answers, accidents {told}, names {sorted(tensors)}\n")
                sys.stdout.write("\n".join(f"{k} {v.dtype} {tuple(v.shape)}" for k, v in tensors.items()) + "\n")
                return 1
            shutil.rmtree(folder)
    sys.stdout.write("".join(f"{name}: {count}\n" for name, count in sorted(counts.items())))
    return 0


def case(chance: random.Random, folder: Path, base: Path, tensors: Document, counts: Counter[str]) -> bool:
    """Whether some of the tools had a result or words for a file."""
    folder.mkdir()
    file, target = folder / "odd.safetensors", folder / "out.safetensors"
    save(tensors, file)
    twice = [str(file), f"{file}@0.5"]
    tools: dict[str, Callable[[], object]] = {
        "inspect": lambda: inspect_file(file),
        "inspect --base": lambda: inspect_file(file, base),
        **{f"convert --to {to}": partial(convert_adapter, file, _path(target, to), to=to, base=base)
           for to in ("kohya", "diffusers", "peft", "ours")},
        "convert --allow-lossy": lambda: convert_adapter(file, target, to="kohya", base=base, allow_lossy=True, rank=2),
        "merge": lambda: merge_adapters(twice, target, settings={"how": "concat"}, base=base),
        "merge --how svd": lambda: merge_adapters(twice, target, settings={"how": "svd", "rank": 3}, base=base),
        "merge --into": lambda: merge_into_base([str(file)], base, folder / "merged", settings={"how": "concat"}),
        "resize": lambda: resize_adapter(file, target, rank=2, base=base),
        "diff": lambda: diff_adapters(file, file, base),
    }  # fmt: skip
    for name, tool in chance.sample(list(tools.items()), TRIED):
        try:
            tool()
            if target.exists():
                read_adapter(target, base)
            counts[f"{name}: done"] += 1
        except UserError as error:
            left = [path.name for path in folder.iterdir() if path != file]
            if left or not str(error).strip():
                sys.stdout.write(f"{name} refused and left {left}: {error}\n")
                return False
            counts[f"{name}: refused"] += 1
        except Exception:  # what is neither is what is looked for
            sys.stdout.write(f"{name}:\n{traceback.format_exc()}")
            return False
        for path in folder.iterdir():
            if path != file:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def _path(target: Path, to: str) -> Path:
    return target.with_suffix("") if to == "peft" else target


if __name__ == "__main__":
    sys.exit(main())
