"""What each layout can store of an adapter: asked by the layouts' writers, and by a run before its first step.

Nothing here needs torch or a tensor, so that a run is told at once what its end would refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.errors import ConfigError, first_few
from finetune.interchange.names import Architecture

Layers = Mapping[tuple[str, str], Collection[str]]
"""(component, layer) -> the parts that an adapter file holds of it; `AdapterFile.layers`."""


@dataclass(frozen=True)
class Carrier:
    """What a layout can store.

    Attributes:
        methods: of layers, as `interchange.adapter.Update` names them.
        otherwise: why it stores no other method.
        reasons: method -> why it does not store this one, where there is more to say.
        biases: whether it stores a change of a layer's bias.
        fusable: methods that it stores for layers that it fuses (a qkv); all others only where it fuses none.
    """

    methods: frozenset[str]
    otherwise: str
    reasons: Mapping[str, str] = field(default_factory=dict)
    biases: bool = False
    fusable: frozenset[str] | None = None

    def why(self, method: str) -> str:
        """Why it does not store a method; empty if it does."""
        return "" if method in self.methods else self.reasons.get(method, self.otherwise)


CARRIERS: dict[str, Carrier] = {
    "diffusers": Carrier(frozenset({"lora", "dora"}), "load_lora_weights reads only LoRA and DoRA"),
    "kohya": Carrier(
        frozenset({"lora", "loha", "lokr", "diff", "ia3", "diag-oft"}),
        "this layout does not support it",
        {"dora": "programs read it differently in this layout (LyCORIS exactly, ComfyUI nearly, A1111 and InvokeAI "
                 "wrongly)"},
        biases=True,
        fusable=frozenset({"lora", "diff"}),
    ),
    "peft": Carrier(
        frozenset({"lora", "dora", "loha", "lokr", "oft", "boft", "ia3"}),
        "this layout does not support it",
        {"diff": "PEFT has no method for full weight differences",
         "full": "PEFT has no method for full weights",
         "diag-oft": "LyCORIS rotates outputs, PEFT rotates inputs"},
    ),
}  # fmt: skip
"""Layout -> what it can store. Whole models (merged, single-file) and this toolkit's own files store everything."""
METHODS = frozenset({method for carrier in CARRIERS.values() for method in carrier.methods} | {"full"})
"""Every method that the layer of an adapter may have."""
STORED_AS = {"rslora": "lora", "locon": "lora", "full": "diff"}
"""Method of a run -> what its layers are in a layout; the others keep their names."""


def remedies(layout: str) -> dict[str, str]:
    """Method that a layout does not store -> why, and with which options `finetune convert` does."""
    told = {}
    for method in sorted(METHODS - CARRIERS[layout].methods):
        exact = [f"--to {name}" for name, other in CARRIERS.items() if method in other.methods]
        told[method] = f"{CARRIERS[layout].why(method)}; use {' or '.join([*exact, '--allow-lossy'])}"
    return told


def obstacles(
    layout: str, method: Mapping[str, str], layers: Layers | None = None, architecture: Architecture | None = None
) -> list[str]:
    """Why a layout cannot store an adapter exactly, a line each; empty if it can.

    Args:
        method: component -> method of the run.
        layers: what is trained; None where only the methods are known yet.
        architecture: names of the base, to tell layers that the layout fuses or has no name for.
    """
    carrier = CARRIERS[layout]
    stored = {component: STORED_AS.get(name, name) for component, name in method.items()}
    found = [f"{name}: {why}" for name in dict.fromkeys(method.values())
             if (why := carrier.why(STORED_AS.get(name, name)))]  # fmt: skip
    biased = [place for place, parts in (layers or {}).items() if "bias" in parts]
    if biased and not carrier.biases and not found:
        found.append(f"{'.'.join(biased[0])} changes a bias, which it does not store")
    if carrier.fusable is not None and architecture is not None and architecture.kohya_names == "original":
        original = architecture.networks[architecture.denoiser].original().values()
        named = {piece.module for pieces in original for piece in pieces}
        alone = {pieces[0].module for pieces in original if len(pieces) == 1 and pieces[0].start == 0}
        own = [module for component, module in layers or () if component == architecture.denoiser]
        found += first_few([f"it has no name for {module}" for module in own if module not in named])
        fused = [module for module in own if module in named - alone]
        if fused and stored[architecture.denoiser] not in {*carrier.fusable, *(METHODS - carrier.methods)}:
            found.append(
                f"{method[architecture.denoiser]}: layers such as {fused[0]} are fused with others in this layout, "
                "where it cannot be stored"
            )
    return found


def automatic(
    method: Mapping[str, str], layers: Layers | None = None, architecture: Architecture | None = None
) -> tuple[str, ...]:
    """The formats of an export where none are named: one for Python and one for programs, as far as they are exact.

    diffusers (peft where that stores it not) and kohya; the whole pipeline where no adapter layout can store it; and
    embeddings alone where only words were learned. For the arguments see `obstacles`.
    """
    if not method:
        return ("embeddings",)
    fitting = [layout for layout in CARRIERS if not obstacles(layout, method, layers, architecture)]
    return tuple(name for name in fitting if name != "peft" or "diffusers" not in fitting) or ("merged",)


def left_out(
    formats: Iterable[str], method: Mapping[str, str], layers: Layers | None, architecture: Architecture | None
) -> dict[str, str]:
    """diffusers and kohya where they are not among automatically chosen formats -> why."""
    missing = {"diffusers", "kohya"} - set(formats) if method else set()
    return {name: "; ".join(obstacles(name, method, layers, architecture)) for name in sorted(missing)}


def check_formats(
    formats: Sequence[str] | None, method: Mapping[str, str], layers: Layers | None = None,
    architecture: Architecture | None = None,
) -> None:  # fmt: skip
    """Refuse formats that the finished adapter could not be exported in; None stands for `automatic` and always can.

    Raises:
        ConfigError: with every format that cannot store it, why, and the formats that can.
    """
    asked = [name for name in formats or () if name in CARRIERS and method]
    problems = [
        f"export.formats has {name}, which cannot store this adapter exactly: {why}"
        for name in asked
        for why in obstacles(name, method, layers, architecture)
    ]
    if problems:
        exact = [name for name in CARRIERS if not obstacles(name, method, layers, architecture)]
        problems.append(
            f"use export.formats=[{', '.join(exact or ['merged'])}], or null for what fits; `finetune export RUN -f "
            "FORMAT --allow-lossy` can write an approximation when the run is finished"
        )
        raise ConfigError("The finished adapter could not be exported as export.formats asks:", problems)
