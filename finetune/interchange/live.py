"""The names of a base that is in memory."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from finetune.families.base import Components, ModelFamily
from finetune.families.text import canonical
from finetune.interchange.names import NO_LAYERS, Architecture, published
from finetune.interchange.original_names import Shape


def architecture_of(family: ModelFamily, components: Components) -> Architecture:
    """The names of a base without adapters; how programs spell them follows the published model most like it."""
    networks = {family.denoiser: components.denoiser, **components.text_encoders}
    own = {component: _layers(component, network) for component, network in networks.items()}

    def likeness(table: Architecture) -> int:
        return sum(table.shape(c, m) is not None for c, layers in own.items() for m in layers)

    best = max((table for table in published() if table.family == family.name), key=likeness)
    known = {c: replace(network, layers=own[c]) for c, network in best.networks.items() if c in own}
    same = all(best.shape(c, m) in (shape, None) for c, layers in own.items() for m, shape in layers.items())
    return replace(best, networks=known, published=same)


def _layers(component: str, network: nn.Module) -> dict[str, Shape]:
    """Canonical name -> shape of the weight."""
    found = {}
    for name, parameter in network.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and 1 <= parameter.ndim <= 4 and not module.endswith(NO_LAYERS):
            found[canonical(network, component, module)] = tuple(parameter.shape)
    return found
