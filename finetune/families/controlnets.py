"""ControlNets from diffusers folders, hub ids and single files.

A file brings no configuration. What its tensors' shapes do not say is as in the base that it steers, of which every
ControlNet is a copy.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from data_tools.hub import only_fetched
from finetune.errors import ConfigError
from finetune.families.detect import otherwise
from finetune.families.original_keys import CONTROLNET, XLABS, Layout
from finetune.families.single_file import DIFFUSERS_OWN, Filler
from finetune.header import PICKLED, Header, read_header

Config = Mapping[str, Any]
CLASSES = ("ControlNetModel", "SD3ControlNetModel", "FluxControlNetModel")
"""diffusers' classes of ControlNets for one kind of control picture."""
UNET_CLASS = CLASSES[0]
USUAL_LOOKS = (16, 32, 96, 256)
"""Widths of the layers that look at the control picture; each but the first halves it."""
FOREIGN = {
    "lllite_": "a ControlNet-LLLite of kohya, which is no ControlNet but a set of small layers that sd-scripts reads",
    "lora_controlnet": "a Control-LoRA, which is only the difference to a base",
    "difference": 'a ControlNet stored as the difference to a base ("diff")',
    "task_embedding": "a union of several ControlNets",
    "transformer_blocks.0.adaLN_modulation.1.weight": "a ControlNet of SD3.5 in Stability's own layout",
    "controlnet_blocks.0.linear.weight": "a MistoLine for Flux",
    "transformer_blocks.0.img_mlp.net.0.proj.weight": "a ControlNet of Qwen-Image",
    "after_proj_list.0.weight": "a ControlNet of Hunyuan-DiT",
    "adapter.": "a T2I-Adapter",
    "body.0.": "a T2I-Adapter",
}
"""What a name in the file begins with -> what the file is. Source: comfy/controlnet.py of ComfyUI."""
BESIDE = ("model.", "first_stage_model.", "cond_stage_model.")
"""The base itself, which the oldest files hold as well."""
INSTEAD = "take a ControlNet for one kind of picture, as a diffusers folder or as one .safetensors file"


@dataclass(frozen=True)
class Kind:
    """One way in which ControlNets stand in files.

    Attributes:
        mark: a tensor that every such file has.
        configured: (shapes by name, the denoiser's configuration) -> what the shapes say of the ControlNet's own.
    """

    mark: str
    class_name: str
    layout: Layout
    configured: Callable[[Mapping[str, tuple[int, ...]], Config], dict[str, Any]]


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that is not loaded yet.

    Attributes:
        name: what the user called it.
        config: with diffusers' class under `_class_name`.
        header: of a single file; None for a folder or hub id.
    """

    name: str
    config: Config
    header: Header | None = None
    layout: Layout = DIFFUSERS_OWN

    def problems(self, networks: Mapping[str, Config] | None) -> list[str]:
        """Why it cannot steer the base with these networks; no weight is read for it.

        Args:
            networks: as `network_configs` gives them; None if they are not known yet.
        """
        if networks is None:
            return []
        found = controlnet_problems(self.config, networks["denoiser"], networks.get("vae"))
        if not found and self.header is not None:
            found = self._filler(torch.float32)[0].problems[:3]
        return [f"--controlnet {self.name}: {problem}" for problem in found]

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The network.

        Raises:
            ConfigError: if it cannot be read.
        """
        if self.header is not None:
            filler, network = self._filler(dtype)
            if network is None or filler.problems:
                raise ConfigError(f"--controlnet {self.name} cannot be loaded:", filler.problems)
            filler.fill()
            return network.eval()
        try:
            with _hushed():
                loaded: nn.Module = diffusers.AutoModel.from_pretrained(
                    self.name, torch_dtype=dtype, use_safetensors=True, local_files_only=only_fetched(self.name)
                )
        except (OSError, ValueError, KeyError) as error:
            raise _unloaded(self.name, error) from None
        return loaded.eval()

    def _filler(self, dtype: torch.dtype) -> tuple[Filler, nn.Module | None]:
        """The network, still empty, and what does not fit the file."""
        assert self.header is not None, "a folder is read by diffusers"
        filler = Filler(self.header)
        network = filler.fit("controlnet", dict(self.config), self.layout, dtype, alone=True)
        unread = [name for name in filler.leftovers() if not name.startswith(BESIDE)]
        if unread and not filler.problems:
            filler.problems.append(f"nothing reads {len(unread)} of its tensors, e.g. {', '.join(unread[:3])}")
        return filler, network


def find_controlnet(name: str, networks: Mapping[str, Config] | None) -> ControlNet:
    """The ControlNet under a name.

    Args:
        name: a .safetensors file, a diffusers folder or a hub id.
        networks: of the base it is to steer; see `ControlNet.problems`.

    Raises:
        ConfigError: if there is none, or it is of another kind.
        UnsafeError: for a pickled file.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in {".safetensors", *PICKLED}:
        if not path.is_file() and path.suffix not in PICKLED:
            raise ConfigError(f"--controlnet {name} is no file here; check the spelling.")
        header = read_header(path)
        kind = _kind(header)
        return ControlNet(name, _config(header, kind, (networks or {}).get("denoiser", {})), header, kind.layout)
    if "/" not in name and not path.is_dir():
        raise ConfigError(
            f"--controlnet {name} is neither a file or folder here nor a hub id, which has the form owner/name."
        )
    try:
        with _hushed():
            return ControlNet(name, diffusers.ControlNetModel.load_config(name, local_files_only=only_fetched(name)))
    except (OSError, ValueError) as error:
        raise _unloaded(name, error) from None


def controlnet_problems(controlnet: Config, denoiser: Config, vae: Config | None) -> list[str]:
    """Why a ControlNet of this configuration cannot steer a denoiser of that one; nothing is loaded for it."""
    kind = controlnet.get("_class_name")
    if kind not in CLASSES:
        return [f"it is of class {kind}; a ControlNet for one kind of picture is one of {', '.join(CLASSES)}."]
    if controlnet.get("num_mode"):
        return [f"it is a union of several ControlNets, which must be told which of them to be; {INSTEAD}."]
    same = ["cross_attention_dim", "joint_attention_dim", "pooled_projection_dim"]
    same += ["block_out_channels", "layers_per_block"] if kind == UNET_CLASS else ["num_attention_heads"]
    for width in same:
        own, wanted = _plain(controlnet.get(width)), _plain(denoiser.get(width))
        # keep: ControlNets of SD3.5 do not read the text.
        if own != wanted and not (width == "joint_attention_dim" and own is None):
            return [
                f"it is made for another kind of base: its {width} is {own}, the base's {wanted}; take one that was "
                "trained on this base's family."
            ]
    if controlnet.get("conditioning_channels") not in {None, 3}:
        return [f"it reads {controlnet['conditioning_channels']} channels and not a picture's three; {INSTEAD}."]
    own = _shrinks(controlnet)
    wanted = 2 ** (len(vae["block_out_channels"]) - 1) if vae else own
    if own is not None and own != wanted:
        return [
            f"it makes its picture {own} times smaller, the base's autoencoder {wanted} times; take one that was "
            "trained on this base."
        ]
    return []


def _shrinks(controlnet: Config) -> int | None:
    """How many times smaller a ControlNet makes the picture itself; None for one that is shown latents."""
    if controlnet["_class_name"] == UNET_CLASS:
        return int(2 ** (len(controlnet.get("conditioning_embedding_out_channels") or USUAL_LOOKS) - 1))
    return 8 if controlnet.get("conditioning_embedding_channels") else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _hushed() -> Iterator[None]:
    """Without diffusers' warning of an argument that it gives the hub's client itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
        yield


def _unloaded(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--controlnet {name} cannot be loaded: {str(error).splitlines()[0].rstrip('.')}. Name a diffusers "
        "ControlNet folder with config.json and safetensors, a .safetensors file, or a hub id; without a network "
        "only what `hf download` has fetched before."
    )


def _kind(header: Header) -> Kind:
    names = {name.removeprefix(CONTROLNET.prefixes[0]) for name in header.tensors}
    foreign = next((what for mark, what in FOREIGN.items() if any(name.startswith(mark) for name in names)), None)
    kind = next((kind for kind in KINDS if kind.mark in names), None)
    if foreign is not None or kind is None:
        what = f"it is {foreign}" if foreign else otherwise(header)
        raise ConfigError(f"--controlnet {header.path.name} cannot be used: {what}; {INSTEAD}.")
    return kind


def _config(header: Header, kind: Kind, denoiser: Config) -> dict[str, Any]:
    """As the base has it, but for what the file's shapes say, and what all programs take from its name."""
    shapes = {name.removeprefix(CONTROLNET.prefixes[0]): entry.shape for name, entry in header.tensors.items()}
    known = inspect.signature(getattr(diffusers, kind.class_name)).parameters
    config = {key: value for key, value in denoiser.items() if key in known} | kind.configured(shapes, denoiser)
    if kind.class_name == UNET_CLASS:
        # keep: no tensor says so; A1111 and ComfyUI know this one ControlNet by its name too.
        config["global_pool_conditions"] = "shuffle" in header.path.name.lower()
    return config | {"_class_name": kind.class_name}


def _of_unet(shapes: Mapping[str, tuple[int, ...]], denoiser: Config) -> dict[str, Any]:
    looks = [shapes[name] for name in _in_order(shapes, r"(controlnet_cond_embedding|input_hint_block)\..*weight")]
    read = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    projections = [len(shape) for name, shape in shapes.items() if name.endswith("proj_in.weight")]
    inputs = shapes.get("conv_in.weight") or shapes.get("input_blocks.0.0.weight") or (0, 0)
    config = {
        "in_channels": inputs[1],
        "conditioning_channels": looks[0][1],
        "conditioning_embedding_out_channels": [shape[0] for shape in looks[::2]],
        "use_linear_projection": 2 in projections,
        **({"cross_attention_dim": read[0]} if read else {}),
    }
    blocks = range(_count(shapes, r"down_blocks\.(\d+)\."))
    if blocks:
        within = [*(f"down_blocks.{block}" for block in blocks), "mid_block"]
        reads = [any(name.startswith(f"{part}.attentions.") for name in shapes) for part in within]
        layers = [_count(shapes, rf"{part}\.attentions\.0\.transformer_blocks\.(\d+)\.") for part in within]
        config |= {
            "down_block_types": ["CrossAttnDownBlock2D" if text else "DownBlock2D" for text in reads[:-1]],
            "mid_block_type": "UNetMidBlock2DCrossAttn" if reads[-1] else "UNetMidBlock2D",
            # keep: diffusers gives the middle as many layers as the last block, which may have no text to read.
            "transformer_layers_per_block": [*layers[:-2], layers[-2] or layers[-1]],
        }
    return config


def _of_flux(shapes: Mapping[str, tuple[int, ...]], denoiser: Config) -> dict[str, Any]:
    own = ("x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1")
    theirs = ("img_in", "txt_in", "vector_in.in_layer")
    width, text, pooled = (shapes[f"{name}.weight"] for name in (own if "x_embedder.weight" in shapes else theirs))
    told = ("time_text_embed.guidance_embedder.linear_1.weight", "guidance_in.in_layer.weight")
    modes = shapes.get("controlnet_mode_embedder.weight")
    looks = _in_order(shapes, r"input_hint_block\..*weight")
    seen = shapes[looks[-1]][0] if looks else None
    return {
        # keep: those that look at the picture pack what they see into tokens themselves.
        "patch_size": math.isqrt(width[1] // seen) if seen else 1,
        "in_channels": width[1],
        "num_layers": _count(shapes, r"(?:transformer|double)_blocks\.(\d+)\."),
        "num_single_layers": _count(shapes, r"single(?:_transformer)?_blocks\.(\d+)\."),
        "num_attention_heads": width[0] // int(denoiser.get("attention_head_dim", 128)),
        "joint_attention_dim": text[1],
        "pooled_projection_dim": pooled[1],
        "guidance_embeds": any(name in shapes for name in told),
        "num_mode": modes[0] if modes else None,
        "conditioning_embedding_channels": seen,
    }


def _of_sd3(shapes: Mapping[str, tuple[int, ...]], denoiser: Config) -> dict[str, Any]:
    width, inputs, patch, _ = shapes["pos_embed_input.proj.weight"]
    text = shapes.get("context_embedder.weight")
    table = shapes.get("pos_embed.pos_embed")
    latents = int(denoiser.get("in_channels", 16))
    own: dict[str, Any] = {
        "num_layers": _count(shapes, r"transformer_blocks\.(\d+)\."),
        "patch_size": patch,
        "num_attention_heads": width // int(denoiser.get("attention_head_dim", 64)),
        "extra_conditioning_channels": inputs - latents,
        "joint_attention_dim": text[1] if text else None,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "dual_attention_layers": [
            number
            for number in range(_count(shapes, r"transformer_blocks\.(\d+)\."))
            if f"transformer_blocks.{number}.attn2.to_q.weight" in shapes
        ],
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
        "use_pos_embed": table is not None,
        # keep: those that read no text are Stability's own for SD3.5, which are told the pooled prompt.
        "force_zeros_for_pooled_projection": text is not None,
    }
    own |= {"caption_projection_dim": text[0]} if text else {}
    return own | ({"pos_embed_max_size": math.isqrt(table[1])} if table else {"pos_embed_type": None})


KINDS = (
    Kind("controlnet_cond_embedding.conv_in.weight", UNET_CLASS, DIFFUSERS_OWN, _of_unet),
    Kind("zero_convs.0.0.weight", UNET_CLASS, CONTROLNET, _of_unet),
    Kind("controlnet_x_embedder.weight", "FluxControlNetModel", DIFFUSERS_OWN, _of_flux),
    Kind("pos_embed_input.weight", "FluxControlNetModel", XLABS, _of_flux),
    Kind("pos_embed_input.proj.weight", "SD3ControlNetModel", DIFFUSERS_OWN, _of_sd3),
)


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the highest number that a pattern finds at the beginning of a name; 0 if it finds none."""
    found = [int(match.group(1)) for name in shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _in_order(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> list[str]:
    """Names that match, in the order of the layers: conv_in, blocks.0, ..., conv_out, or by number."""
    names = [name for name in shapes if re.fullmatch(pattern, name)]
    numbers = {"conv_in": -1, "conv_out": len(names)}
    return sorted(names, key=lambda name: numbers.get(name.split(".")[1]) or int(re.findall(r"\d+", name)[0]))
