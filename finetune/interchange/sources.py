"""Where an adapter lies and how strong its parts are meant to be: one file, a PEFT folder, or several of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from finetune.demo import BASE_DIR
from finetune.errors import CheckpointError, ConfigError
from finetune.families.places import DEMO
from finetune.header import Header, Tensors, read_header
from finetune.interchange.layouts import BESIDE, OURS, Layer, Resolved, resolve, weight_fits
from finetune.interchange.names import Architecture, from_base, published
from finetune.run_files import ADAPTER_FILE

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_CONFIG = 10_000_000
"""Bytes of a PEFT configuration; real ones have a few thousand."""
DIFFUSERS_SETTINGS = "lora_adapter_metadata"
KNOWN_FILES = ("pytorch_lora_weights.safetensors", ADAPTER_FILE)


@dataclass(frozen=True)
class Source:
    """One file of an adapter.

    Attributes:
        header: what it holds.
        resolved: which layers that is.
        layout: "kohya", "diffusers", "peft", "ours", "comfy", "lycoris", ...: name for people and tables.
        settings: component -> PEFT's settings, as far as the file or folder states them.
    """

    header: Header
    resolved: Resolved
    layout: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def fits(self, layer: Layer) -> bool:
        """Whether a layer is as large as in the base that its name was found in; true where nothing tells."""
        architecture, up = self.resolved.architecture, layer.parts.get("lora_B.weight")
        if architecture is not None and self.resolved.kind == "checkpoint":
            return weight_fits(self.header, layer.stem, layer.meaning, architecture)
        if architecture is None or up is None:
            return True
        return self.header.tensors[up].shape[:1] == (sum(piece.stop - piece.start for piece in layer.pieces),)

    def scale(self, layer: Layer, rank: int | None, tensors: Tensors) -> float:
        """What a layer's update is multiplied by, by the rules of the layout's own readers.

        Kohya's: alpha / rank, and 1 where alpha is missing or zero or there is no rank. PEFT's: lora_alpha / r with the
        patterns, / sqrt(r) for rsLoRA; without settings diffusers takes alpha = rank.

        Raises:
            CheckpointError: if alpha is no number.
        """
        if "alpha" in layer.parts:
            values = np.asarray(tensors.array(layer.parts["alpha"]), dtype=np.float64).ravel()
            if values.size != 1 or not np.isfinite(values[0]):
                raise CheckpointError(
                    f"{self.header.path} has no usable alpha for {layer.stem}.", ["expected one finite number."]
                )
            return float(values[0]) / rank if rank and values[0] else 1.0
        piece = layer.pieces[0]
        settings = self.settings.get(piece.component)
        if not settings or layer.method in UNSCALED:
            return 1.0
        own_rank = _patterned(settings.get("rank_pattern"), piece.module) or settings.get("r") or rank or 1
        alpha = _patterned(settings.get("alpha_pattern"), piece.module)
        if alpha is None:
            alpha = settings.get("lora_alpha", settings.get("alpha", own_rank))
        return float(alpha) / (math.sqrt(own_rank) if settings.get("use_rslora") else own_rank)


UNSCALED = {"oft", "boft", "diag-oft", "ia3", "full", "diff", "nothing"}
"""Methods that know no alpha."""


def of_no_published_size(sources: Iterable[Source]) -> bool:
    """Whether most layers have other sizes than in the base whose names they have, so that it must be another one."""
    fitting = [source.fits(layer) for source in sources for layer in source.resolved.layers]
    return fitting.count(False) * 2 > len(fitting)


def open_sources(path: Path, base: Architecture | None = None) -> list[Source]:
    """Every file of the adapter, checkpoint or embedding at `path`, with its keys resolved.

    Args:
        path: a .safetensors file; or a folder of PEFT, of PEFT folders per network, or of a run.
        base: names of the base at hand; without it the published models are tried, and the embedded base if a file
            says that it is for that one.

    Raises:
        ConfigError: if nothing is there.
        CheckpointError, UnsafeError: see `read_header`.
    """
    sources = _opened(path, base)
    if base is None and _names_embedded(sources[0].header):
        own = _opened(path, _embedded())
        if not of_no_published_size(own) and not any(source.resolved.unknown for source in own):
            return own
    return sources


def _names_embedded(header: Header) -> bool:
    metadata = header.metadata
    stated = _json_text(header.path, OURS, metadata.get(OURS, "{}")).get("base")
    return DEMO in (stated, metadata.get("finetune.base"), metadata.get("ss_sd_model_name"))


@cache
def _embedded() -> Architecture:
    return replace(from_base(BASE_DIR), title="the embedded base model (demo)")


def _opened(path: Path, base: Architecture | None) -> list[Source]:
    if path.is_dir():
        folders = [path, *sorted(item for item in path.iterdir() if item.is_dir())]
        peft = [folder for folder in folders if (folder / PEFT_CONFIG).is_file()]
        if peft:
            return [_peft(folder, base) for folder in peft]
        for name in KNOWN_FILES:
            if (path / name).is_file():
                return [_file(path / name, base)]
        raise ConfigError(
            f"{path} contains no adapter.",
            [f"{PEFT_CONFIG} or {' or '.join(KNOWN_FILES)} was expected; name the adapter file itself."],
        )
    return [_file(path, base)]


def words_beside(path: Path, metadata: Mapping[str, str]) -> dict[str, Path]:
    """Learned word -> the file of its own where an adapter's metadata say that it lies, there or not.

    Raises:
        CheckpointError: if that is not beside the adapter, or the list is damaged.
    """
    listed = _json_text(path, BESIDE, metadata.get(BESIDE, "{}"))
    found, wrong = {}, []
    for word, name in listed.items():
        parts = PurePosixPath(str(name)).parts
        if len(parts) != 2 or ".." in parts or PurePosixPath(str(name)).is_absolute():
            wrong.append(f"the word {word!r} is listed in {name!r}, which is not next to the adapter.")
        else:
            # A PEFT folder holds its words, or an export laid them beside it.
            found[word] = path / name if (path / name).is_file() else path.parent / name
    if wrong:
        raise CheckpointError(f"{path} has learned words that cannot be read.", wrong)
    return found


def told_beside(path: Path, metadata: Mapping[str, str]) -> list[str]:
    """What to say of an adapter's words in files of their own; strangers' metadata may be anything."""
    try:
        places = words_beside(path, metadata)
    except CheckpointError as error:
        return [error.headline, *error.problems]
    lost = ", which is missing; sampling needs it there, convert, merge and diff ignore it"
    return [f"its learned word {word} is in {file}{'' if file.is_file() else lost}." for word, file in places.items()]


def _file(path: Path, base: Architecture | None) -> Source:
    header = read_header(path)
    resolved = resolve(header, base)
    if OURS in header.metadata:
        return Source(header, resolved, "ours", _own_settings(header))
    dialects = [name for name, _ in resolved.dialects().most_common()]
    layout = dialects[0] if dialects else resolved.kind
    return Source(header, resolved, layout, _diffusers_settings(header, resolved))


def _peft(folder: Path, base: Architecture | None) -> Source:
    config_path = folder / PEFT_CONFIG
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} has a {PEFT_CONFIG} and no {PEFT_WEIGHTS}.",
            ["PEFT's older .bin files can run code and are not read; save it again with safe_serialization=True."],
        )
    settings = _json_file(config_path)
    header = read_header(folder / PEFT_WEIGHTS)
    components = {component for table in published() for component in table.networks}
    candidates = [folder.name] if folder.name in components else sorted(components)
    tried = [(resolve(header, base, component), component) for component in candidates]
    resolved, component = max(tried, key=lambda pair: len(pair[0].layers))
    return Source(header, resolved, "peft", {component: settings})


def _diffusers_settings(header: Header, resolved: Resolved) -> dict[str, dict[str, Any]]:
    """`save_lora_weights` writes one flat table, "unet.r": 16, "unet.lora_alpha": 8, ..."""
    text = header.metadata.get(DIFFUSERS_SETTINGS)
    if not text:
        return {}
    flat = _json_text(header.path, DIFFUSERS_SETTINGS, text)
    found: dict[str, dict[str, Any]] = {}
    networks = set(resolved.architecture.networks) if resolved.architecture else set()
    for key, value in flat.items():
        component, _, name = key.partition(".")
        if component in networks:
            found.setdefault(component, {})[name] = value
    return found


def _own_settings(header: Header) -> dict[str, dict[str, Any]]:
    own = _json_text(header.path, OURS, header.metadata[OURS])
    rank, alpha, method = own.get("rank", {}), own.get("alpha", {}), own.get("method", {})
    if not all(isinstance(table, dict) for table in (rank, alpha)):
        raise CheckpointError(f"{header.path} has an unreadable header.", ["rank and alpha are not tables."])
    found: dict[str, dict[str, Any]] = {}
    for component in rank:
        prefix = f"{component}."
        named = method.get(component) if isinstance(method, dict) else method
        found[component] = {
            "r": rank[component],
            "lora_alpha": alpha.get(component, rank[component]),
            "use_rslora": named == "rslora",
            "options": own.get("options") or {},
            **{
                pattern: {
                    f"^{re.escape(name.removeprefix(prefix))}": value
                    for name, value in (own.get(pattern) or {}).items()
                    if name.startswith(prefix)
                }
                for pattern in ("rank_pattern", "alpha_pattern")
            },
        }
    return found


def _patterned(patterns: object, module: str) -> float | None:
    """PEFT's rule: a key is a regular expression that ends the module's name, and may begin with ^ for the whole."""
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        exact = key.removeprefix("^")
        same = module == exact or module.endswith(f".{exact}") or module == exact.replace("\\", "")
        if same or _matches(key, module):
            return float(value)
    return None


def _matches(key: str, module: str) -> bool:
    if len(key) > 400:
        return False
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error:
        return False


def _json_file(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_CONFIG:
        raise CheckpointError(f"{path} is too large for a configuration.", [f"the limit is {LARGEST_CONFIG:,} bytes."])
    return _json_text(path, path.name, path.read_text(encoding="utf-8", errors="replace"))


def _json_text(path: Path, what: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its {what} is not JSON.", ["download or save it again."]) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: its {what} is not a table.", ["download or save it again."])
    return value
