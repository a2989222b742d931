"""What a file is, from its header and, for adapters, its numbers; without torch, so that the answer comes at once."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import counted
from finetune.header import Header, clean, hash_bytes, open_tensors
from finetune.interchange.compatibility import READERS, Verdict, judge
from finetune.interchange.layouts import LOSSES, OURS, Layer, blocks, said
from finetune.interchange.names import Architecture, from_base, published
from finetune.interchange.norms import change_norm
from finetune.interchange.sources import Source, of_no_published_size, open_sources, told_beside

HASHED_BELOW = 1 << 30
"""Bytes; larger files are hashed only on request, which takes seconds per gigabyte."""
FAMILY_WORDS = {"attention": r"attn|self_attn|Attention", "feed-forward": r"\bff|mlp|proj_mlp|Dense", "norms": r"norm"}
LEGACY_SPAN = (0x100000, 0x10000)
SHOWN_TAGS = 20
BLOCK_ORDER = ["down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks"]


@dataclass(frozen=True)
class Strength:
    """How much an adapter changes one block of a network.

    Attributes:
        norm: Frobenius norm of all changes of weights, scale included.
        rms: the same per weight: norm / sqrt(weights).
    """

    component: str
    block: str
    layers: int
    norm: float
    rms: float


@dataclass(frozen=True)
class Coverage:
    """Which layers of one kind are changed, of those the base has."""

    component: str
    kind: str
    hit: int
    total: int
    missed: tuple[str, ...]


@dataclass
class Facts:
    """What `finetune inspect` says about a file; every text in it is fit for a terminal.

    Attributes:
        kind: "adapter", "checkpoint", "embedding" or "unknown".
        layout: how names are spelled.
        notes: what is odd, or would be lost or misread by somebody.
        family, base: of the base it is for; the family is empty where the shapes fit no published model.
        candidates: families that fit equally well, where only the base could tell.
        methods, ranks, scales: value -> how many layers have it.
        loads_in: program -> whether it can use the file, and why not.
        training: what the file says about how it came to be.
        unknown: names of tensors that mean nothing here.
    """

    path: str
    bytes: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    kind: str
    layout: str
    family: str = ""
    base: str = ""
    candidates: list[str] = field(default_factory=list)
    methods: dict[str, dict[str, int]] = field(default_factory=dict)
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    scales: dict[str, dict[str, int]] = field(default_factory=dict)
    coverage: list[Coverage] = field(default_factory=list)
    strengths: list[Strength] = field(default_factory=list)
    trigger_words: list[str] = field(default_factory=list)
    tokens: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    tags: list[tuple[str, int]] = field(default_factory=list)
    training: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    loads_in: dict[str, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_file(path: str | Path, base: Path | None = None, *, hashes: bool = False, norms: bool = True) -> Facts:
    """Look into an adapter, a checkpoint or an embedding.

    Args:
        path: a .safetensors file, a PEFT folder or a run's folder.
        base: pipeline folder of the base, if that is of no published size.
        hashes: hash the bytes even of files above HASHED_BELOW.
        norms: measure how much each block is changed; reads the whole adapter.

    Raises:
        ConfigError: if there is nothing of the kind.
        CheckpointError, UnsafeError: if the file is damaged, hostile or a pickle.
    """
    path = Path(path)
    sources = open_sources(path, from_base(base) if base else None)
    headers = [source.header for source in sources]
    entries = [entry for header in headers for entry in header.tensors.values()]
    metadata = {clean(key, 80): clean(value, 400) for key, value in headers[0].metadata.items()}
    facts = Facts(
        path=clean(path, 1000),
        bytes=sum(header.size for header in headers),
        tensors=len(entries),
        parameters=sum(entry.count for entry in entries),
        dtypes=dict(Counter(entry.dtype for entry in entries).most_common()),
        kind=sources[0].resolved.kind,
        layout=sources[0].layout,
        training=_training(headers[0].metadata),
        tags=_tags(headers[0].metadata),
        trigger_words=_trigger_words(headers[0].metadata),
        metadata=metadata,
    )
    architecture = next((source.resolved.architecture for source in sources if source.resolved.architecture), None)
    fitting = [source.fits(layer) for source in sources for layer in source.resolved.layers]
    foreign = of_no_published_size(sources)
    if architecture and foreign:
        named = next((table.title for table in published() if said(metadata, table)), "")
        told = f"the file names {named}" if named else f"its layer names resemble {architecture.title}"
        facts.base = f"an unpublished base model; {told} (give it with --base FOLDER)"
    elif architecture:
        facts.family, facts.base = architecture.family, architecture.title
        several = [family for family in sources[0].resolved.candidates if family != architecture.family]
        facts.candidates = [architecture.family, *several] if several else []
    facts.unknown = [clean(name, 120) for source in sources for name in source.resolved.unknown]
    for source in sources:
        _tokens(facts, source)
        if facts.kind == "adapter" and architecture:
            _adapter(facts, source, norms)
    if architecture and facts.kind == "adapter" and not foreign:
        facts.coverage = _coverage(architecture, [layer for source in sources for layer in source.resolved.layers])
        facts.loads_in = {reader: judge(reader, architecture, sources) for reader in READERS}
    _notes(facts, sources, fitting)
    facts.notes += [clean(note, 600) for note in told_beside(path, headers[0].metadata)]
    for header in headers:
        facts.hashes |= _hashes(header, hashes, "" if len(headers) == 1 else f"{header.path.parent.name}/")
    return facts


def _adapter(facts: Facts, source: Source, norms: bool) -> None:
    """Methods, ranks, scales and norms of one file, layer by layer."""
    groups: dict[tuple[str, str], list[tuple[float, int]]] = {}
    with open_tensors(source.header) as tensors:
        for layer in source.resolved.layers:
            component = layer.pieces[0].component
            rank = rank_of(layer, source.header)
            scale = source.scale(layer, rank, tensors)
            _count(facts.methods, component, layer.method)
            if rank:
                _count(facts.ranks, component, str(rank))
                _count(facts.scales, component, f"{scale:.4g}")
            if norms:
                found = change_norm(layer, tensors, scale)
                if found is not None:
                    place = component, blocks([layer.pieces[0].module])[layer.pieces[0].module]
                    groups.setdefault(place, []).append(found)
    for (component, block), values in groups.items():
        norm = math.sqrt(sum(value**2 for value, _ in values))
        weights = sum(count for _, count in values)
        facts.strengths.append(Strength(component, block, len(values), norm, norm / math.sqrt(max(1, weights))))
    facts.strengths.sort(key=lambda strength: (strength.component, block_order(strength.block)))


def rank_of(layer: Layer, header: Header) -> int | None:
    """Width of a layer's update by the shapes of its tensors; None for methods without one."""
    for part in ("lora_A.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in layer.parts and header.tensors[layer.parts[part]].shape:
            return header.tensors[layer.parts[part]].shape[0]
    return None


def _coverage(architecture: Architecture, layers: Iterable[Layer]) -> list[Coverage]:
    touched = {(piece.component, piece.module) for layer in layers for piece in layer.pieces}
    found = []
    for component, network in architecture.networks.items():
        if not any(owner == component for owner, _ in touched):
            continue
        kinds: dict[str, list[str]] = {}
        for module, shape in network.layers.items():
            kinds.setdefault(_kind(module, shape), []).append(module)
        for kind, modules in kinds.items():
            missed = [module for module in modules if (component, module) not in touched]
            if kind != "norms" or len(missed) < len(modules):
                hit = len(modules) - len(missed)
                found.append(Coverage(component, kind, hit, len(modules), tuple(missed) if hit else ()))
    return found


def _kind(module: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return "norms"
    if shape[2:] not in ((), (1, 1)):
        return "convolutions"
    own = re.split(r"\.(?:attentions|transformer_blocks|single_transformer_blocks|layers|block)\.\d+\.", module)[-1]
    return next((kind for kind, pattern in FAMILY_WORDS.items() if re.search(pattern, own)), "projections and others")


def _tokens(facts: Facts, source: Source) -> None:
    words = _json(source.header.metadata.get(OURS, "")).get("tokens") or []
    for word, vectors in source.resolved.tokens.items():
        named = words[int(word)] if word.isdigit() and int(word) < len(words) else word or source.header.path.stem
        shapes = {network: list(source.header.tensors[name].shape) for network, name in vectors.items()}
        facts.tokens.setdefault(clean(named, 80), {}).update(shapes)
    if facts.kind == "embedding":
        widths = {shape[-1] for vectors in facts.tokens.values() for shape in vectors.values() if shape}
        facts.base = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}.get(
            max(widths, default=0), ""
        )


def _notes(facts: Facts, sources: list[Source], fitting: list[bool]) -> None:
    if lossy := sources[0].header.metadata.get(LOSSES):
        facts.notes.append(clean(f"made by a lossy conversion, according to the file: {lossy}", 600))
    variants = Counter(
        layer.meaning.variant for source in sources for layer in source.resolved.layers if layer.meaning.variant
    )
    if facts.family:
        facts.notes += [f"{variant} ({counted(count, 'layer')})." for variant, count in variants.items()]
    dialects = sum((source.resolved.dialects() for source in sources), Counter())
    if len(dialects) > 1 and facts.kind == "adapter" and facts.family:
        facts.notes.append("several naming schemes are mixed: " + ", ".join(f"{k} ({v})" for k, v in dialects.items()))
    if facts.unknown and facts.kind == "adapter":
        facts.notes.append(f"{counted(len(facts.unknown), 'tensor')} with unknown names.")
    if facts.candidates:
        facts.notes.append(f"it fits {' and '.join(facts.candidates)} equally well; give its base with --base.")
    if facts.kind == "adapter" and facts.family and not all(fitting):
        facts.notes.append(
            f"{fitting.count(False)} of {len(fitting)} layers have other shapes than {facts.base}: "
            "it is for a different base model (give it with --base)."
        )
    if facts.kind == "adapter" and not facts.family and fitting:
        facts.notes.append("its base model is needed to list missing layers and compatible programs (--base).")


def _hashes(header: Header, wanted: bool, prefix: str) -> dict[str, str]:
    """Hashes of the bytes, and whether the ones the file itself states are right."""
    if header.size > HASHED_BELOW and not wanted:
        return {}
    whole, body = hash_bytes(header)
    found = {"sha256": whole, "sshs_model_hash": body, "modelspec.hash_sha256": f"0x{body}"}
    with open(header.path, "rb") as stream:
        stream.seek(LEGACY_SPAN[0])
        if legacy := stream.read(LEGACY_SPAN[1]):
            found["sshs_legacy_hash"] = hashlib.sha256(legacy).hexdigest()[:8]
    # keep: the legacy hash is stated for a header without hashes in it, so it cannot be held against these bytes.
    for name in ("sshs_model_hash", "modelspec.hash_sha256"):
        stated = header.metadata.get(name)
        if stated and name in found and stated.lower() != found[name]:
            found[f"{name} as stated"] = f"{clean(stated, 80)} (wrong: it does not match the file)"
    return {prefix + name: value for name, value in found.items()}


TRAINING = {
    "title": ("modelspec.title", "ss_output_name"),
    "base model": ("finetune.base", "ss_sd_model_name", "modelspec.architecture"),
    "base version": ("ss_base_model_version",),
    "trainer": ("finetune.trainer",),
    "network": ("ss_network_module",),
    "network arguments": ("ss_network_args",),
    "steps": ("ss_steps", "finetune.step", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "pictures": ("ss_num_train_images",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "learning rate": ("ss_learning_rate", "ss_unet_lr"),
    "optimizer": ("ss_optimizer",),
    "stated rank, alpha": ("ss_network_dim",),
    "clip skip": ("ss_clip_skip",),
    "prediction": ("modelspec.prediction_type",),
    "seed": ("ss_seed",),
    "date": ("modelspec.date",),
    "author": ("modelspec.author",),
    "licence": ("modelspec.license",),
    "description": ("modelspec.description",),
}
"""What people call it -> metadata entries that say it; the first that is there."""


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for label, entries in TRAINING.items():
        value = next((metadata[name] for name in entries if metadata.get(name) not in (None, "", "None", "{}")), None)
        if value is not None:
            found[label] = clean(value, 200)
    if "stated rank, alpha" in found and metadata.get("ss_network_alpha"):
        found["stated rank, alpha"] += f", {clean(metadata['ss_network_alpha'], 20)}"
    return found


def _tags(metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """The most frequent words of the captions, as kohya's trainer counts them per folder."""
    counted: Counter[str] = Counter()
    for folder in _json(metadata.get("ss_tag_frequency", "")).values():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int) and not isinstance(count, bool):
                counted[clean(tag, 60)] += count
    return counted.most_common(SHOWN_TAGS)


def _trigger_words(metadata: Mapping[str, str]) -> list[str]:
    words = metadata.get("modelspec.trigger_phrase", "").split(",")
    own = _json(metadata.get(OURS, "")).get("trigger_words")
    words += [str(word) for word in own] if isinstance(own, list) else []
    try:
        datasets = json.loads(metadata.get("ss_datasets", "[]"))
        words += [subset.get("class_tokens") or "" for dataset in datasets for subset in dataset.get("subsets", ())]
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    return [word for word in dict.fromkeys(clean(word, 80) for word in words) if word]


def _json(text: str) -> dict[str, Any]:
    """A table that stands as JSON in a text; empty if it is not one: strangers' metadata may be anything."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def block_order(block: str) -> tuple[int, str, int]:
    """Blocks in the order in which a network runs through them."""
    stem, number = re.fullmatch(r"(.*?)[. ]?(\d*)", block).groups()  # type: ignore[union-attr]
    return BLOCK_ORDER.index(stem) if stem in BLOCK_ORDER else len(BLOCK_ORDER), stem, int(number or 0)


def _count(table: dict[str, dict[str, int]], component: str, value: str) -> None:
    counts = table.setdefault(component, {})
    counts[value] = counts.get(value, 0) + 1
