"""Parameter names of original single files <-> diffusers' own, one table of rules per kind of network.

Every rule set is one function from a diffusers name to its `Place` in an original file. Reading and writing both follow
from it, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.families.original_keys import clip, controlnet, flux, mmdit, unet, vae
from finetune.families.original_keys.place import Place
from finetune.families.text import canonical

IDENTITY = "identity"
"""The form of a matrix that files leave out, because it changes nothing."""
Naming = Callable[[str, Mapping[str, Any]], Place]
"""(diffusers name, configuration of the network) -> where it stands in an original file."""


@dataclass(frozen=True)
class Layout:
    """How one network stands in an original file.

    Attributes:
        naming: the rules.
        prefixes: what its names begin with; the first is written, all are read.
    """

    naming: Naming
    prefixes: tuple[str, ...]


def to_original(layout: Layout, component: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors under the names, and in the shapes, of an original single file.

    Args:
        layout: of this network in its family's files.
        component: its pipeline name, e.g. "unet" or "text_encoder_2".
        module: the network, for its configuration and its canonical names; its own weights are not read.
        tensors: name as installed -> tensor, e.g. a state dict, merged or not.

    Raises:
        ConfigError: if the network holds something that the file's readers would not use.
    """
    settings = config_of(module)
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        place = layout.naming(canonical(module, component, name), settings)
        if place.form == IDENTITY:
            _refuse_projection(component, tensor)
            continue
        parts.setdefault(layout.prefixes[0] + place.name, {})[place.part] = OUTWARDS[place.form](tensor)
    return {
        name: torch.cat([found[part] for part in sorted(found)]) if len(found) > 1 else found[min(found)].contiguous()
        for name, found in parts.items()
    }


def _refuse_projection(component: str, tensor: Tensor) -> None:
    if not torch.equal(tensor.float().cpu(), torch.eye(*tensor.shape)):
        raise ConfigError(
            f"{component} has a projection that is not the identity, and single files of this family have no place for "
            "it; export a diffusers folder."
        )


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """A network's configuration as a plain table, whichever library it is from."""
    config: Any = module.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _same(tensor: Tensor) -> Tensor:
    """As it is."""
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    """Rows for columns: OpenCLIP multiplies by its projection from the right."""
    return tensor.T


def _as_convolution(tensor: Tensor) -> Tensor:
    """A linear layer's weight (out, in) as that of a 1x1 convolution."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _as_linear(tensor: Tensor) -> Tensor:
    """A 1x1 convolution's weight as that of a linear layer."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor


def _halves_swapped(tensor: Tensor) -> Tensor:
    """(scale, shift) for (shift, scale): both halves of the first dimension change places."""
    return torch.cat(tuple(reversed(tensor.chunk(2))))


OUTWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "same": _same, "transposed": _transposed, "convolution": _as_convolution, "swapped": _halves_swapped,
}  # fmt: skip
"""Form of a place -> how our tensor becomes the file's."""
INWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "same": _same, "transposed": _transposed, "convolution": _as_linear, "swapped": _halves_swapped,
}  # fmt: skip
"""Form of a place -> how the file's tensor becomes ours."""

UNET = Layout(unet.original, ("model.diffusion_model.",))
LDM_VAE = Layout(vae.original, ("first_stage_model.", "vae.", ""))
MMDIT = Layout(mmdit.original, ("model.diffusion_model.", ""))
FLUX = Layout(flux.original, ("model.diffusion_model.", ""))
CONTROLNET = Layout(controlnet.of_unet, ("control_model.", ""))
XLABS = Layout(controlnet.of_flux, ("",))


def plain(*prefixes: str) -> Layout:
    """Transformers' own names below a prefix; without one in files that hold nothing else."""
    return Layout(clip.plain, (*prefixes, ""))


def unprojected(*prefixes: str) -> Layout:
    """Transformers' own names of a CLIP whose projection is the identity and is not stored."""
    return Layout(clip.unprojected, (*prefixes, ""))


def open_clip(*prefixes: str) -> Layout:
    """OpenCLIP's names below a prefix."""
    return Layout(clip.open_clip, prefixes)


__all__ = [
    "CONTROLNET", "FLUX", "INWARDS", "LDM_VAE", "MMDIT", "OUTWARDS", "UNET", "XLABS", "Layout", "Place", "config_of",
    "open_clip", "plain", "to_original", "unprojected",
]  # fmt: skip
