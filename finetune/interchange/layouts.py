"""From the names of tensors in a file to layers and parts of adapters, whoever wrote it. No tensor is looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from finetune.header import Header
from finetune.interchange import names
from finetune.interchange.names import Architecture, Spelled
from finetune.interchange.original_names import Piece

OURS = "finetune_adapter"
"""Metadata entry of this toolkit's own adapter files."""
LOSSES = "finetune.lossy"
"""Metadata entry: a JSON list of what conversions lost, the oldest first; see `lossy`."""
BESIDE = "finetune.embeddings"
"""Metadata entry: JSON table, word -> its embedding's file, relative to the adapter's folder. An export has a folder
to itself and lays them in `embeddings`; a conversion may have other files around it and takes `NAME.embeddings`."""
WORD = "finetune.word"
"""Metadata entry of an embedding's file: the learned word."""
PARTS = {
    "lora_A.weight": "lora_A.weight",
    "lora_A.default.weight": "lora_A.weight",
    "lora_down.weight": "lora_A.weight",
    "lora.down.weight": "lora_A.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_B.default.weight": "lora_B.weight",
    "lora_up.weight": "lora_B.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "lora_mid.weight": "lora_mid.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_B.default.bias": "lora_B.bias",
    "lora_up.bias": "lora_B.bias",
    "alpha": "alpha",
    "network_alpha": "alpha",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    "dora_scale": "lora_magnitude_vector",
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "oft_R.weight": "oft_R.weight",
    "oft_R.default.weight": "oft_R.weight",
    "boft_R": "boft_R",
    "boft_s": "boft_s",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_blocks",
    "rescale": "rescale",
    "ia3_l": "ia3_l",
    "on_input": "on_input",
    "a1.weight": "a1.weight",
    "a2.weight": "a2.weight",
    "b1.weight": "b1.weight",
    "b2.weight": "b2.weight",
    "diff": "diff",
    "diff_b": "diff_b",
    "set_weight": "set_weight",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "weight": "weight",
    "bias": "bias",
}
"""How a key ends -> what the tensor is; PEFT's names where it has one. Longer endings are tried first."""
NOT_TELLING = {"", "weight", "bias", "alpha", "rescale", "on_input", "diff"}
"""Parts that other files have too, or that say nothing alone."""
MARKS = {
    "glora": {"a1.weight"},
    "loha": {"hada_w1_a"},
    "lokr": {"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"},
    "oft": {"oft_R.weight"},
    "boft": {"boft_R"},
    "diag-oft": {"oft_blocks"},
    "ia3": {"ia3_l", "on_input"},
    "dora": {"lora_magnitude_vector"},
    "lora": {"lora_A.weight", "lora_B.weight"},
    "full": {"weight", "bias", "set_weight"},
    "diff": {"diff", "diff_b"},
}
"""Method -> parts of which one tells it; in this order, because a DoRA has all parts of a LoRA."""
_ENDINGS = sorted(PARTS, key=len, reverse=True)
_ATTENTION_PROCESSOR = re.compile(r"^(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
ANY_ENCODER = "the text encoder"
"""What stands for the one text encoder of a base where a file does not name it."""
_EMBEDDING_KEYS = {"emb_params", "clip_l", "clip_g", "t5", "t5xxl", "string_to_param"}


@dataclass(frozen=True)
class Layer:
    """What a file holds for one layer, or for several in one.

    Attributes:
        stem: how the file calls the layer.
        meaning: which layers it is.
        parts: canonical part -> name of the tensor.
    """

    stem: str
    meaning: Spelled
    parts: Mapping[str, str]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The rows of base layers that it changes."""
        return self.meaning.pieces

    @property
    def method(self) -> str:
        """Name in MARKS."""
        return next((method for method, marks in MARKS.items() if marks & set(self.parts)), "nothing")


@dataclass
class Resolved:
    """A file's tensors, sorted.

    Attributes:
        kind: "adapter", "embedding", "checkpoint" or "unknown".
        architecture: the kind of base; None where no name is known.
        candidates: families that fit as well; more than one where only the shapes or the base could tell.
        layers: what is understood.
        unknown: names of tensors that are not.
        tokens: learned token -> component or reader's network name -> name of the tensor.
    """

    kind: str
    architecture: Architecture | None = None
    candidates: tuple[str, ...] = ()
    layers: list[Layer] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    tokens: dict[str, dict[str, str]] = field(default_factory=dict)

    def dialects(self) -> Counter[str]:
        """Dialect -> how many layers are spelled in it."""
        return Counter(layer.meaning.dialect for layer in self.layers)

    def methods(self) -> Counter[str]:
        """Method -> how many layers have it."""
        return Counter(layer.method for layer in self.layers)


def resolve(header: Header, architecture: Architecture | None = None, component: str | None = None) -> Resolved:
    """Sort the tensors of a file.

    Args:
        architecture: the base's own names; without it the published model that fits best is taken.
        component: the network a file belongs to where its keys do not say so (PEFT folders).
    """
    keys = {name: name for name in header.tensors}
    if component:
        keys = {f"{component}.{name.removeprefix('base_model.model.')}": name for name in keys}
    tokens, rest = _tokens(keys, header)
    if not rest:
        return Resolved("embedding", architecture, tokens=tokens)
    stems = _stems(rest)
    telling = any(set(parts) - NOT_TELLING for parts in stems.values()) or OURS in header.metadata
    telling = telling or any(set(parts) & {"diff", "diff_b", "on_input"} for parts in stems.values())
    if not telling:
        return _checkpoint(header, architecture, tokens)
    # keep: where nothing tells bases apart, as for CLIP alone, the one with the fewest networks is assumed, and said.
    tables = [architecture] if architecture else sorted(names.published(), key=lambda table: len(table.networks))
    scored = sorted(((_fit(header, stems, table), table) for table in tables), key=lambda pair: pair[0], reverse=True)
    best, chosen = scored[0]
    if best[0] == 0:
        return Resolved("adapter", tokens=tokens, unknown=sorted(rest.values()))
    equal = tuple(dict.fromkeys(table.family for score, table in scored if score == best))
    table_spelled = _table(chosen)
    layers: list[Layer] = []
    unknown: list[str] = []
    for stem, parts in stems.items():
        meaning = table_spelled.get(stem)
        if meaning is None or "" in parts:
            unknown += parts.values()
        else:
            layers.append(Layer(stem, meaning, parts))
    return Resolved("adapter", chosen, equal, layers, sorted(unknown), tokens)


def split_key(key: str) -> tuple[str, str]:
    """(stem, part) of a tensor's name; the part is empty where no ending is known."""
    if match := _ATTENTION_PROCESSOR.match(key):
        stem, projection, direction = match.groups()
        if ".self_attn" in stem:
            leaf = f"{projection}_proj"
        else:
            leaf = f"to_{projection}" + (".0" if projection == "out" else "")
        return f"{stem}.{leaf}", "lora_A.weight" if direction == "down" else "lora_B.weight"
    for ending in _ENDINGS:
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], PARTS[ending]
    return key, ""


def _stems(keys: Mapping[str, str]) -> dict[str, dict[str, str]]:
    stems: dict[str, dict[str, str]] = {}
    for key, tensor in keys.items():
        stem, part = split_key(key)
        parts = stems.setdefault(stem, {})
        # keep: two spellings of one part in one file would make one of them vanish.
        parts["" if part in parts else part] = tensor
    return stems


def _table(architecture: Architecture) -> dict[str, Spelled]:
    return names.spellings(architecture.name) if architecture.published else names.spelled(architecture)


def _fit(header: Header, stems: Mapping[str, Mapping[str, str]], table: Architecture) -> tuple[int, ...]:
    """How well a table explains a file: known names, whether most fit, the file's own word, how many fit, spelling."""
    known = shapes = plain = 0
    spelled = _table(table)
    for stem, parts in stems.items():
        meaning = spelled.get(stem)
        if meaning:
            known += 1
            shapes += _shapes_fit(header, parts, table, meaning)
            plain += meaning.dialect != "kohya-diffusers"
    return known, shapes * 2 > known, said(header.metadata, table), shapes, plain


def said(metadata: Mapping[str, str], table: Architecture) -> int:
    """How many of a file's own entries name this kind of base, 0 to 2."""
    architecture = metadata.get("modelspec.architecture", "").split("/")[0].removesuffix("-lora")
    version = metadata.get("ss_base_model_version", "")
    return (architecture in table.modelspec) + any(version.startswith(known) for known in table.kohya_versions)


def _shapes_fit(header: Header, parts: Mapping[str, str], table: Architecture, meaning: Spelled) -> bool:
    rows = sum(piece.stop - piece.start for piece in meaning.pieces)
    shape = table.shape(meaning.pieces[0].component, meaning.pieces[0].module) or ()
    for part, axis, size in (
        ("lora_A.weight", 1, shape[1:2]), ("lora_B.weight", 0, (rows,)), ("hada_w1_a", 0, (rows,)),
        ("hada_w1_b", -1, shape[1:2] if len(shape) == 2 else ()), ("diff", 0, (rows,)), ("diff_b", 0, (rows,)),
    ):  # fmt: skip
        if part in parts and size:
            found = header.tensors[parts[part]].shape
            if found[axis:][:1] != size[:1]:
                return False
    return True


def _tokens(keys: Mapping[str, str], header: Header) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(learned tokens, the other keys)."""
    tokens: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    alone = all(key in _EMBEDDING_KEYS or (key.startswith("<") and key.endswith(">")) for key in keys)
    alone = alone or WORD in header.metadata
    for key, tensor in keys.items():
        words = key.split(".")
        if key.startswith("bundle_emb.") and len(words) >= 3:
            network = words[-1] if words[-1] in _EMBEDDING_KEYS else ANY_ENCODER
            tokens.setdefault(words[1], {})[network] = tensor
        elif len(words) == 3 and words[1] == "token_embedding" and words[0].startswith("text_encoder"):
            tokens.setdefault(words[-1], {})[words[0]] = tensor
        elif alone and key in _EMBEDDING_KEYS:
            word = header.metadata.get(WORD, "")
            tokens.setdefault(word, {})[ANY_ENCODER if key == "emb_params" else key] = tensor
        elif alone or words[0] == "string_to_param":
            tokens.setdefault(header.metadata.get(WORD) or words[-1].strip("*"), {})[ANY_ENCODER] = tensor
        else:
            rest[key] = tensor
    return tokens, rest


def _checkpoint(header: Header, architecture: Architecture | None, tokens: dict[str, dict[str, str]]) -> Resolved:
    """A whole model, or one network of it."""
    best: tuple[tuple[int, ...], Architecture, dict[str, Spelled]] | None = None
    for table in [architecture] if architecture else names.published():
        spelled = _weights(table)
        hits = [name for name in header.tensors if name in spelled]
        fitting = sum(weight_fits(header, name, spelled[name], table) for name in hits)
        # keep: shapes first; where none fits, the base is of another size and the file's own word is the best guess.
        score = (fitting * 2 > len(hits), said(header.metadata, table), fitting, len(hits))
        if hits and (best is None or score > best[0]):
            best = score, table, spelled
    if best is None or best[0][-1] < 0.2 * len(header.tensors):
        return Resolved("unknown", unknown=sorted(header.tensors), tokens=tokens)
    _, table, spelled = best
    layers = [Layer(name, spelled[name], {"weight": name}) for name in header.tensors if name in spelled]
    rest = [name for name in header.tensors if name not in spelled]
    return Resolved("checkpoint", table, (table.family,), layers, rest, tokens)


def _weights(table: Architecture) -> dict[str, Spelled]:
    """Name of a weight, in a single-file checkpoint or in a file of a diffusers folder -> what it is."""
    found: dict[str, Spelled] = {}
    for network in table.networks.values():
        for name, pieces in network.in_checkpoint().items():
            found.setdefault(name, Spelled("checkpoint", pieces))
            found.setdefault(f"model.diffusion_model.{name}", Spelled("checkpoint", pieces))
        for name, shape in network.layers.items():
            whole = (Piece(network.component, name, 0, shape[0]),)
            found.setdefault(f"{name}.weight", Spelled("diffusers", whole))
            found.setdefault(f"{name.removeprefix(names.CLIP_ROOT)}.weight", Spelled("diffusers", whole))
    return found


def weight_fits(header: Header, name: str, meaning: Spelled, table: Architecture) -> bool:
    """Whether a weight of a checkpoint has the shape that a table of names gives it."""
    shape = table.shape(meaning.pieces[0].component, meaning.pieces[0].module)
    rows = sum(piece.stop - piece.start for piece in meaning.pieces)
    return shape is not None and header.tensors[name].shape == (rows, *shape[1:])


def blocks(modules: Iterable[str]) -> dict[str, str]:
    """Module -> the block of the network it belongs to, e.g. "down_blocks.1"."""
    found = {}
    for module in modules:
        match = re.match(r"((?:\w+_)?(?:single_transformer|transformer|down|up)_blocks\.\d+|mid_block)", module)
        layer = re.search(r"(?:layers|block)\.(\d+)\.", module)
        found[module] = match[1] if match else f"layer {layer[1]}" if layer else "ends"
    return found
