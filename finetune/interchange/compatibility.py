"""Which programs can use an adapter file as it is, judged by their own loading rules.

Sources: diffusers 0.42 loaders/lora_conversion_utils.py; ComfyUI 0.3.64 comfy/lora.py; A1111 1.10.1
    extensions-builtin/Lora/networks.py; InvokeAI (August 2026) patches/lora_conversions; sd-scripts (February 2026)
    networks/lora*.py. The rules of diffusers are tested against the installed library. The others' own code was run
    once on files for full-size models, layer by layer (docs/experiments.md); programs change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.errors import counted
from finetune.header import open_tensors
from finetune.interchange.layouts import Layer
from finetune.interchange.names import Architecture
from finetune.interchange.sources import Source

YES, PARTLY, NO = "yes", "partly", "no"


@dataclass(frozen=True)
class Verdict:
    """Whether a program can use a file: "yes", "partly" (it loads, but something is lost or wrong) or "no"."""

    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """What the rules ask about."""

    architecture: Architecture
    dialects: frozenset[str]
    methods: frozenset[str]
    layers: tuple[Layer, ...]
    unknown: int
    tokens: bool
    unet: bool
    alphas_differ: bool
    layout: str


def judge(reader: str, architecture: Architecture, sources: list[Source]) -> Verdict:
    """What the program named `reader` in READERS makes of the files."""
    layers = tuple(layer for source in sources for layer in source.resolved.layers)
    case = Case(
        architecture,
        frozenset(layer.meaning.dialect for layer in layers),
        frozenset(layer.method for layer in layers),
        layers,
        sum(len(source.resolved.unknown) for source in sources),
        any(source.resolved.tokens for source in sources),
        architecture.denoiser == "unet",
        any(_alphas_differ(source) for source in sources),
        sources[0].layout,
    )
    if not layers:
        return Verdict(NO, "no key names a layer of a known base model")
    if case.layout == "ours":
        return Verdict(NO, "this toolkit's own layout; `finetune convert` writes other layouts")
    if case.layout == "peft":
        return _peft_folder(reader)
    return READERS[reader](case)


def shortcomings(architecture: Architecture, sources: list[Source]) -> list[str]:
    """What programs that run this kind of base make of the files, where that is not everything."""
    running = [name for name in READERS if name.lower() in architecture.serves or name not in ("A1111", "InvokeAI")]
    verdicts = {name: judge(name, architecture, sources) for name in running}
    return [f"{name}: {found.reason}." for name, found in verdicts.items() if found.verdict != YES]


def _peft_folder(reader: str) -> Verdict:
    if reader == "diffusers":
        return Verdict(
            PARTLY, "a PEFT folder: load it with PeftModel.from_pretrained; load_lora_weights takes a single file"
        )
    return Verdict(NO, "a PEFT folder; it only reads single files")


def diffusers(case: Case) -> Verdict:
    """`pipeline.load_lora_weights`."""
    beyond = sorted(case.methods - {"lora", "dora"})
    if beyond:
        return Verdict(NO, f"load_lora_weights reads LoRA only, not {', '.join(beyond)}")
    rules = KOHYA_IN_DIFFUSERS if case.dialects & UNDERSCORED else DOTTED_IN_DIFFUSERS
    found = next((verdict for applies, verdict in rules if applies(case)), None)
    return found or (Verdict(PARTLY, "it ignores the learned words") if case.tokens else Verdict(YES))


UNDERSCORED = {"kohya", "kohya-diffusers", "lycoris"}
KOHYA_IN_DIFFUSERS: list[tuple[Callable[[Case], bool], Verdict]] = [
    (lambda case: "lycoris" in case.dialects, Verdict(NO, "it does not know lycoris_ names")),
    (lambda case: case.unknown > 0, Verdict(NO, "it refuses a kohya file with keys it does not know")),
    (lambda case: case.tokens, Verdict(NO, "it refuses a kohya file with bundled learned words")),
    (lambda case: "mmdit" in _styles(case), Verdict(NO, "it has no reader for kohya files of this family")),
    (
        lambda case: "bfl" in _styles(case) and bool(_outside_blocks(case)),
        Verdict(NO, "under these names it drops Flux layers outside the blocks"),
    ),
    (
        lambda case: "dora" in case.methods,
        Verdict(PARTLY, "it drops DoRA's magnitudes from kohya files: the picture is wrong"),
    ),
    (
        lambda case: case.alphas_differ,
        Verdict(PARTLY, "alpha / rank differs between layers, but it uses one value for to_q, q_proj and fc1"),
    ),
    (
        lambda case: "kohya-diffusers" in case.dialects and _touches(case, "add_embedding"),
        Verdict(PARTLY, "under these names it drops add_embedding.linear_1 and .linear_2"),
    ),
    (
        lambda case: _lonely_projections(case) > 0,
        Verdict(PARTLY, "it drops text encoder attention layers whose out_proj is not trained too"),
    ),
]
DOTTED_IN_DIFFUSERS: list[tuple[Callable[[Case], bool], Verdict]] = [
    (
        lambda case: "diffusers" in case.dialects and _mixed_leaves(case),
        Verdict(PARTLY, "names mix .lora.down and .lora_A: it drops the attention layers (diffusers#14548)"),
    ),
    (
        lambda case: "bare" in case.dialects,
        Verdict(PARTLY, "names without a network: the denoiser's own load_lora_adapter reads them"),
    ),
    (
        lambda case: "comfy" in case.dialects,
        Verdict(NO, "it does not know dotted original names for this family"),
    ),
]
"""What goes wrong, in the order of how much; the first that applies is the verdict."""


def comfyui(case: Case) -> Verdict:
    """ComfyUI's LoraLoader; Forge reads by the same rules."""
    if "bare" in case.dialects:
        return Verdict(NO, "names without a network")
    if case.methods & {"ia3"}:
        return Verdict(NO, "IA3 is not read")
    if "dora" in case.methods and "diffusers" in case.dialects:
        return Verdict(PARTLY, "it drops DoRA's magnitudes under diffusers names: the picture is wrong")
    if case.methods & {"dora"}:
        return Verdict(PARTLY, "DoRA is applied with the norm of W instead of W + BA: similar, but not equal")
    return _whole(case, _missed_by_comfyui)


def a1111(case: Case) -> Verdict:
    """stable-diffusion-webui's built-in networks."""
    if "a1111" not in case.architecture.serves:
        return Verdict(NO, f"it does not run {case.architecture.title}")
    if case.dialects - {"kohya", "kohya-diffusers"}:
        return Verdict(NO, "it reads kohya names only")
    if "dora" in case.methods:
        return Verdict(PARTLY, "DoRA is normalised per input: wrong results without any message")
    if "kohya-diffusers" in case.dialects and (_touches(case, "add_embedding") or _touches(case, "upsamplers")):
        return Verdict(PARTLY, "add_embedding and upsamplers.0 are ignored under diffusers names")
    return _whole(case, _missed_by_a1111)


def invokeai(case: Case) -> Verdict:
    """InvokeAI's model manager."""
    if "invokeai" not in case.architecture.serves:
        return Verdict(NO, f"it cannot load adapters for {case.architecture.title}")
    if not case.unet:
        return _invokeai_flux(case)
    mixed = {"kohya", "kohya-diffusers"}
    refused = {
        "it reads kohya names only for UNets": bool(case.dialects - mixed),
        "it refuses files that mix original and diffusers names": _denoiser_dialects(case) == mixed,
        "it does not support rotations of outputs": "diag-oft" in case.methods,
    }
    if any(refused.values()):
        return Verdict(NO, next(reason for reason, applies in refused.items() if applies))
    if "dora" in case.methods:
        return Verdict(PARTLY, "DoRA is normalised per input: wrong results without any message")
    odd = [layer for layer in case.layers if layer.meaning.variant.startswith("lora_te")]
    skips = f"it skips {len(odd)} text encoder layers: {odd[0].meaning.variant}" if odd else ""
    return Verdict(PARTLY, skips) if odd else _with_unknown(case)


def _invokeai_flux(case: Case) -> Verdict:
    """Flux files are recognised whole or not at all."""
    if "kohya" in case.dialects:
        if any(layer.stem.startswith("lora_te3") for layer in case.layers):
            return Verdict(NO, "it does not know T5's prefix lora_te3, which sd-scripts and ComfyUI share")
        outside = _outside_blocks(case)
        if outside - {"proj_out"}:
            return Verdict(NO, f"it refuses the file for layers outside the blocks ({min(outside - {'proj_out'})})")
        return Verdict(PARTLY, "it skips final_layer") if outside else _with_unknown(case)
    if case.dialects == {"diffusers"}:
        text = any(layer.pieces[0].component != case.architecture.denoiser for layer in case.layers)
        if text or "norm_out.linear" in _outside_blocks(case):
            return Verdict(NO, "it refuses diffusers names of text encoders and of norm_out")
    return _with_unknown(case)


def kohya(case: Case) -> Verdict:
    """sd-scripts: merge_lora.py, --network_weights, gen_img.py."""
    if _denoiser_dialects(case) - {"kohya"}:
        return Verdict(NO, "it finds layers only under kohya names (original names for this family)")
    if case.methods - {"lora"}:
        named = ", ".join(sorted(case.methods - {"lora"}))
        return Verdict(PARTLY, f"{named} only through LyCORIS (network_module=lycoris.kohya)")
    if not case.unet and any("alpha" not in layer.parts for layer in case.layers):
        return Verdict(NO, "it fails on layers without alpha; `finetune convert` adds one")
    odd = [layer for layer in case.layers if layer.meaning.variant]
    if odd:
        return Verdict(PARTLY, f"it skips {counted(len(odd), 'layer')}: {odd[0].meaning.variant}")
    return _whole(case, _missed_by_kohya)


READERS: dict[str, Callable[[Case], Verdict]] = {
    "diffusers": diffusers,
    "ComfyUI, Forge": comfyui,
    "A1111": a1111,
    "InvokeAI": invokeai,
    "kohya": kohya,
}
"""Program -> its rules."""


CLIP_BLOCK = re.compile(r"\.(mlp\.fc[12]|self_attn\.([qkv]|out)_proj)$")
"""The layers of a CLIP block that adapters usually change."""
ENDS = re.compile(r"conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|proj_out|norm_out")
"""Layers before the first block of a denoiser and after the last."""


def _missed_by_comfyui(case: Case, layer: Layer) -> bool:
    piece = layer.pieces[0]
    dotted = layer.meaning.dialect == "diffusers"
    if piece.component == case.architecture.denoiser:
        return case.unet and dotted and ".to_" in piece.module and ".processor." not in next(iter(layer.parts.values()))
    if layer.meaning.dialect == "comfy":
        return False
    if piece.component not in _clips(case):
        return dotted
    if len(_clips(case)) == 1 and layer.stem.startswith(("lora_te2", "text_encoder_2")):
        return True
    return not CLIP_BLOCK.search(piece.module) and (dotted or piece.module != "text_projection")


def _missed_by_a1111(case: Case, layer: Layer) -> bool:
    piece = layer.pieces[0]
    network = case.architecture.networks[piece.component]
    if piece.component == case.architecture.denoiser:
        blocked = layer.method == "ia3" and len(network.layers[piece.module]) > 2
        return blocked or (case.architecture.kohya_names == "diffusers" and piece.module == "conv_norm_out")
    if network.checkpoint_style == "open_clip":
        return not CLIP_BLOCK.search(piece.module)
    return network.kohya[0] == "lora_te" and piece.module.endswith("final_layer_norm")


def _missed_by_kohya(case: Case, layer: Layer) -> bool:
    piece = layer.pieces[0]
    if piece.component != case.architecture.denoiser:
        return piece.module == "text_projection"
    return bool(ENDS.match(piece.module))


def _whole(case: Case, missed: Callable[[Case, Layer], bool]) -> Verdict:
    """What is left to say of a file whose make a program knows: which of its layers it has no names for."""
    lost = [layer for layer in case.layers if missed(case, layer)]
    if not lost:
        return _with_unknown(case)
    named = f"{len(lost)} of {len(case.layers)} layers are ignored, such as {lost[0].stem}"
    return Verdict(NO if len(lost) == len(case.layers) else PARTLY, named)


def _clips(case: Case) -> list[str]:
    """The text encoders of CLIP's kind."""
    return [
        component
        for component, network in case.architecture.networks.items()
        if any(CLIP_BLOCK.search(module) for module in network.layers) and component != case.architecture.denoiser
    ]


def _outside_blocks(case: Case) -> set[str]:
    """The denoiser's layers that stand in no block."""
    return {
        piece.module
        for layer in case.layers
        for piece in layer.pieces
        if piece.component == case.architecture.denoiser and "blocks." not in piece.module
    }


def _with_unknown(case: Case) -> Verdict:
    if case.unknown:
        return Verdict(PARTLY, f"{counted(case.unknown, 'tensor is', 'tensors are')} not known and would be skipped")
    if case.tokens:
        return Verdict(PARTLY, "learned words are only read by programs that support bundled embeddings")
    return Verdict(YES)


def _styles(case: Case) -> set[str]:
    return {network.style for network in case.architecture.networks.values()}


def _touches(case: Case, word: str) -> bool:
    return any(word in piece.module for layer in case.layers for piece in layer.pieces)


def _denoiser_dialects(case: Case) -> set[str]:
    return {layer.meaning.dialect for layer in case.layers if layer.pieces[0].component == case.architecture.denoiser}


def _mixed_leaves(case: Case) -> bool:
    names = [name for layer in case.layers for name in layer.parts.values()]
    old = any(".lora.down" in name or ".lora_linear_layer." in name for name in names)
    return old and any(".lora_A." in name for name in names)


def _lonely_projections(case: Case) -> int:
    """Layers of text encoder attention blocks whose out_proj is not in the file."""
    modules = {
        (piece.component, piece.module)
        for layer in case.layers
        for piece in layer.pieces
        if "self_attn." in piece.module
    }
    return sum((component, module.rpartition(".")[0] + ".out_proj") not in modules for component, module in modules)


def _alphas_differ(source: Source) -> bool:
    """Whether kohya alphas give layers different alpha / rank; one number each, so reading them costs nothing."""
    with open_tensors(source.header) as tensors:
        found = set()
        for layer in source.resolved.layers:
            down = layer.parts.get("lora_A.weight")
            rank = source.header.tensors[down].shape[0] if down and source.header.tensors[down].shape else None
            if "alpha" in layer.parts:
                found.add(round(source.scale(layer, rank, tensors), 9))
    return len(found) > 1
