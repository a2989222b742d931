"""What the layers of base models are called, and how every program spells them in adapter files.

Underscored names (`lora_unet_down_blocks_0_...`) cannot be split by rules, because module names hold underscores too;
they are looked up among the names that exist. The published models' names stand in `names/*.json`, written from their
configurations; any other base brings its own, read from the headers of its files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.header import Header, read_header
from finetune.interchange.original_names import SCALED, STYLES, Fused, Piece, Shape

FOLDER = Path(__file__).parent / "names"
NO_LAYERS = ("token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias")
"""Names of weights in two dimensions that are tables, not layers."""
CLIP_ROOT = "text_model."


@dataclass(frozen=True)
class Network:
    """One network of a base model.

    Attributes:
        layers: dotted name, as on disk, -> shape of the weight.
        style: name in STYLES; how adapter files with original names call the layers.
        kohya: prefixes of underscored keys; the first is what kohya's trainer writes for this network.
        comfy: prefix of dotted keys with original names.
        checkpoint: prefix of its tensors in a single-file checkpoint.
        checkpoint_style: name in STYLES for that file.
    """

    component: str
    layers: Mapping[str, Shape]
    style: str
    kohya: tuple[str, ...]
    comfy: str
    checkpoint: str
    checkpoint_style: str

    def original(self) -> dict[str, tuple[Piece, ...]]:
        """Original name -> the rows it stands for."""
        return self._pieces(STYLES[self.style](self.layers))

    def in_checkpoint(self) -> dict[str, tuple[Piece, ...]]:
        """Name of a weight in a single-file checkpoint -> the rows it holds."""
        prefix = f"{self.checkpoint}." if self.checkpoint else ""
        named = self._pieces(STYLES[self.checkpoint_style](self.layers))
        style = SCALED.get(self.checkpoint_style)
        scaled = self._pieces(style(self.layers)) if style else {}
        # keep: torch's fused attention calls its parameter in_proj_weight, without a dot.
        return {
            f"{prefix}{name}{'_weight' if name.endswith('in_proj') else '.weight'}": pieces
            for name, pieces in named.items()
        } | {f"{prefix}{name}.scale": pieces for name, pieces in scaled.items()}

    def _pieces(self, named: Fused) -> dict[str, tuple[Piece, ...]]:
        return {name: tuple(Piece(self.component, *rows) for rows in parts) for name, parts in named.items()}


@dataclass(frozen=True)
class Architecture:
    """The names of one kind of base model.

    Attributes:
        name: of the table; `family` is the name in FAMILIES, which several tables may share.
        denoiser: component that draws.
        kohya_names: "diffusers" or "original": which names kohya's trainer underscores for the denoiser.
        modelspec: ids under modelspec.architecture.
        kohya_versions: values under ss_base_model_version.
        serves: programs that can run this kind of base at all, of those that cannot run every kind.
        published: whether shapes are those of a published model and can be compared with.
    """

    name: str
    family: str
    title: str
    denoiser: str
    kohya_names: str
    modelspec: tuple[str, ...]
    kohya_versions: tuple[str, ...]
    serves: tuple[str, ...]
    networks: Mapping[str, Network]
    published: bool = True

    def shape(self, component: str, module: str) -> Shape | None:
        """Shape of a layer's weight; None where there is no such layer."""
        network = self.networks.get(component)
        return network.layers.get(module) if network else None


@dataclass(frozen=True)
class Spelled:
    """What a key's stem means.

    Attributes:
        dialect: name in DIALECTS.
        pieces: the rows of layers that it stands for.
        variant: what is odd about it although it is understood; empty mostly.
    """

    dialect: str
    pieces: tuple[Piece, ...]
    variant: str = ""


DIALECTS = {
    "kohya": "kohya (sd-scripts, A1111, Forge, ComfyUI, InvokeAI)",
    "kohya-diffusers": "kohya prefixes with diffusers names (OneTrainer, ai-toolkit, diffusers' converter)",
    "lycoris": "LyCORIS with diffusers names (SimpleTuner)",
    "diffusers": "diffusers",
    "bare": "module names without a network (diffusers attention processors, PEFT)",
    "comfy": "original names with dots (ComfyUI, OneTrainer, ai-toolkit)",
    "ours": "this toolkit's own",
}
"""Name -> who writes it."""


@cache
def published() -> tuple[Architecture, ...]:
    """The tables of the published models."""
    return tuple(_from_table(path) for path in sorted(FOLDER.glob("*.json")))


@cache
def spellings(name: str) -> dict[str, Spelled]:
    """`spelled` for a published table, made once."""
    return spelled(next(architecture for architecture in published() if architecture.name == name))


def spelled(architecture: Architecture) -> dict[str, Spelled]:
    """Every stem that any program writes for a layer of this base -> what it means.

    Raises:
        AssertionError: if one stem would mean two layers; a table could not be trusted then.
    """
    found: dict[str, Spelled] = {}
    for network in architecture.networks.values():
        for stem, meaning in _spelled(architecture, network):
            for alias, variant in _without_clip_root(network, stem):
                candidate = replace(meaning, variant=variant or meaning.variant)
                before = found.setdefault(alias, candidate)
                assert before.pieces == candidate.pieces, f"{alias} means {before.pieces} and {candidate.pieces}"
    return found


def from_base(path: Path) -> Architecture:
    """The names of a base at hand, whatever its size: a diffusers pipeline folder.

    Only headers are read. How programs spell the names follows the published model that is most like it.

    Raises:
        ConfigError: if the folder is no pipeline.
        CheckpointError: if one of its files is damaged.
    """
    if not (path / "model_index.json").is_file():
        raise ConfigError(
            f"{path} is not a base model folder.",
            ["it has no model_index.json; give a diffusers pipeline folder."],
        )
    own: dict[str, dict[str, Shape]] = {}
    for folder in sorted(item for item in path.iterdir() if item.is_dir()):
        layers: dict[str, Shape] = {}
        for file in sorted(folder.glob("*.safetensors")):
            layers |= layers_in(read_header(file), folder.name)
        if layers:
            own[folder.name] = layers

    def likeness(candidate: Architecture) -> tuple[int, bool, float, int]:
        names = {(c, m, len(s)) for c, n in candidate.networks.items() for m, s in n.layers.items()}
        mine = {(c, m, len(s)) for c, layers in own.items() if c != "vae" for m, s in layers.items()}
        equal = sum(candidate.shape(c, m) == s for c, layers in own.items() for m, s in layers.items())
        missing = sum(component not in own for component in candidate.networks)
        foreign = sum(component not in candidate.networks for component in own if component != "vae")
        # keep: small models of SD1's and SD2's make differ in nothing but the width of the text that they read.
        denoiser = candidate.networks[candidate.denoiser].layers
        reads = _text_widths(denoiser) == _text_widths(own.get(candidate.denoiser, {}))
        return -missing - 2 * foreign, reads, len(names & mine) / max(1, len(names | mine)), equal

    best = max(published(), key=likeness)
    networks = {
        component: replace(network, layers=own[component])
        for component, network in best.networks.items()
        if component in own
    }
    if best.denoiser not in networks:
        raise ConfigError(
            f"{path} contains no weights of a known model.",
            [f"a folder {best.denoiser}/ with .safetensors files was expected."],
        )
    return replace(best, networks=networks, published=False)


def _text_widths(layers: Mapping[str, Shape]) -> set[int]:
    """What a UNet's cross-attention takes in, per token."""
    return {shape[1] for module, shape in layers.items() if module.endswith("attn2.to_k")}


def table_of(base: Path | None) -> Architecture | None:
    """The names of a base that a user named: those of its folder; None for a single file or no base at all.

    A single file's names are those of the published models, among which a reader finds them without help.

    Raises:
        ConfigError, CheckpointError: if there is no such base.
    """
    if base is None or base.is_dir():
        return from_base(base) if base else None
    read_header(base)
    return None


def layers_in(header: Header, component: str) -> dict[str, Shape]:
    """Name -> shape of the layers whose weights a file of a diffusers folder holds, under canonical names."""
    layers = {}
    for name, entry in header.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and 1 <= len(entry.shape) <= 4 and not module.endswith(NO_LAYERS):
            layers[canonical_module(component, module)] = entry.shape
    return layers


def canonical_module(component: str, module: str) -> str:
    """A text encoder's module as on disk: CLIP modules carry `text_model.` whatever wrote them."""
    roots = ("encoder.layers.", "embeddings.", "final_layer_norm")
    flat = component.startswith("text_encoder") and module.startswith(roots)
    return CLIP_ROOT + module if flat else module


def _spelled(architecture: Architecture, network: Network) -> Iterator[tuple[str, Spelled]]:
    original = network.original()
    plain = {name: (Piece(network.component, name, 0, shape[0]),) for name, shape in network.layers.items()}
    denoiser = network.component == architecture.denoiser
    native = original if denoiser and architecture.kohya_names == "original" else plain
    for number, prefix in enumerate(network.kohya):
        for name, pieces in native.items():
            variant = "" if number == 0 else f"{prefix}_ instead of {network.kohya[0]}_"
            yield f"{prefix}_{name}".replace(".", "_"), Spelled("kohya", pieces, variant)
        for name, pieces in plain.items() if native is original else ():
            yield f"{prefix}_{name}".replace(".", "_"), Spelled("kohya-diffusers", pieces)
    for name, pieces in plain.items():
        yield f"{network.component}.{name}", Spelled("diffusers", pieces)
    for name, pieces in original.items():
        yield f"{network.comfy}.{name}", Spelled("comfy", pieces)
    if denoiser:
        for name, pieces in plain.items():
            yield name, Spelled("bare", pieces)
            yield f"base_model.model.{name}", Spelled("bare", pieces)
            yield f"lycoris_{name}".replace(".", "_"), Spelled("lycoris", pieces)
            yield f"{network.comfy}.{name}", Spelled("comfy", pieces, "diffusers names")
        for name, pieces in original.items():
            if name not in plain:
                yield name, Spelled("comfy", pieces, "no prefix")


def _without_clip_root(network: Network, stem: str) -> Iterator[tuple[str, str]]:
    """The stem, and for CLIP the one that programs with a flattened text encoder write."""
    yield stem, ""
    for root in (CLIP_ROOT, CLIP_ROOT.replace(".", "_")):
        if network.component.startswith("text_encoder") and root in stem:
            yield stem.replace(root, "", 1), "text_model is missing from the names"


def _from_table(path: Path) -> Architecture:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    networks = {}
    for component, facts in document.pop("components").items():
        layers = dict(_unfold(facts.pop("layers")))
        facts["style"], facts["kohya"] = facts.pop("original"), tuple(facts["kohya"])
        networks[component] = Network(component, layers, **facts)
    listed: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
    }
    return Architecture(name=path.stem, networks=networks, **listed)


def _unfold(tree: Mapping[str, Any], stem: str = "") -> Iterator[tuple[str, Shape]]:
    """Names from the tree in a table, where branches that are equal share a key with spaces in it."""
    for keys, value in tree.items():
        for key in keys.split(" ") if keys else [""]:
            name = f"{stem}.{key}".strip(".")
            if isinstance(value, list):
                yield name, tuple(value)
            else:
                yield from _unfold(value, name)
