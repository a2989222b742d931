"""What `finetune sample` draws with, loaded and checked: base, adapters, ControlNet, refiner, pictures that steer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import nn

from finetune.adapters import AdapterFile
from finetune.adapters.files import ADAPTER_FILE
from finetune.config import ModelConfig, has_word
from finetune.errors import ConfigError
from finetune.families import Components, ModelFamily, load_model
from finetune.families.folders import names_folder
from finetune.sampling.guides import STRENGTH, Guides
from finetune.sampling.merging import adapter_digest, merge_first, read_adapter
from finetune.sampling.papers import UsedAdapter
from finetune.sampling.stages import Refiner
from finetune.sampling.wanted import ROLES, Wanted
from finetune.storage import sha256_file, tensor_bytes
from finetune.tracking import Reporter
from finetune.training.build import DTYPES, auto_dtype


@dataclass
class Studio:
    """What is loaded."""

    family: ModelFamily
    components: Components
    dtype: str
    device: torch.device
    adapters: list[tuple[AdapterFile, UsedAdapter]]
    guides: Guides
    refiner: Refiner | None
    digests: dict[str, str] = field(default_factory=dict)


def open_studio(model: ModelConfig, wanted: Wanted, reporter: Reporter) -> Studio:
    """Load everything; cheap mistakes are told before anything large is read.

    Raises:
        UserError: for pictures, adapters, bases and ControlNets that cannot be read or do not fit.
    """
    pictures, problems = _pictures(wanted)
    network = wanted.controlnet
    if network and "/" not in network and not Path(network).is_dir():
        problems.append(f"--controlnet {network} is neither a folder here nor a hub id, which has the form owner/name.")
    adapters = []
    names = names_folder(model.base)
    for path, strength in wanted.adapters:
        file = adapter_path(path)
        used = UsedAdapter(name=file.name, sha256=adapter_digest(file), strength=strength)
        adapters.append((read_adapter(file, names), used))
    if problems:
        raise ConfigError("No picture can be made:", problems)
    dtype = auto_dtype() if model.dtype == "auto" else model.dtype
    with reporter.progress("Loading the base model", 1) as advance:
        # keep: packed weights are for training; adapters are applied to whole ones.
        family, components = load_model(model, DTYPES[dtype], whole=True)
        merge_first(wanted.merge_first, family, components, names)
        refiner = _refiner(wanted, model, dtype)
        advance(1, "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    strength = STRENGTH if wanted.strength is None else wanted.strength
    guides = Guides(
        pictures.get("image"), strength, pictures.get("mask"), pictures.get("control"), wanted.control_from,
        _controlnet(wanted.controlnet, DTYPES[dtype]) if wanted.controlnet else None,
        1.0 if wanted.control_scale is None else wanted.control_scale,
    )  # fmt: skip
    digests = {role: sha256_file(path) for role in ROLES if (path := getattr(wanted, role)) is not None}
    if guides.controlnet is not None:
        digests["controlnet"] = _weights_digest(guides.controlnet)
    if refiner is not None:
        digests["refiner"] = refiner.components.digest
    _warn_of_triggers(adapters, wanted, reporter)
    for read, used in adapters:
        if read.header.base_digest and read.header.base_digest != components.digest:
            reporter.note(f"{used.name} was made on another base ({read.header.base}); results may differ from its own")
    return Studio(family, components, dtype, device, adapters, guides, refiner, digests)


def _refiner(wanted: Wanted, model: ModelConfig, dtype: str) -> Refiner | None:
    if wanted.refiner is None:
        return None
    base, start = wanted.refiner
    own = ModelConfig(base=base, prompt_chunks=model.prompt_chunks)
    return Refiner(*load_model(own, DTYPES[dtype], whole=True), start)


def _pictures(wanted: Wanted) -> tuple[dict[str, Image.Image], list[str]]:
    found, problems = {}, []
    for role in ROLES:
        path = getattr(wanted, role)
        if path is None:
            continue
        try:
            with Image.open(path) as image:
                found[role] = image.convert("L" if role == "mask" else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"--{role} {path} cannot be read as a picture: {error}.")
    return found, problems


def adapter_path(path: Path) -> Path:
    """The file or PEFT folder that holds an adapter's weights, of a run folder its finished one.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_dir() and (path / ADAPTER_FILE).is_file():
        return path / ADAPTER_FILE
    if path.is_dir() and (path / "run.json").is_file():
        raise ConfigError(f"{path} holds a run without a finished adapter; `finetune train {path}` finishes it.")
    if not path.exists():
        raise ConfigError(f"--adapter {path} does not exist; name a .safetensors file, a PEFT folder or a run folder.")
    return path


def _controlnet(name: str, dtype: torch.dtype) -> nn.Module:
    try:
        loaded: nn.Module = diffusers.AutoModel.from_pretrained(name, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--controlnet {name} cannot be loaded: {str(error).splitlines()[0].rstrip('.')}. Name a diffusers "
            "ControlNet folder with config.json and safetensors, or a hub id."
        ) from None
    return loaded.eval()


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _warn_of_triggers(adapters: list[tuple[AdapterFile, UsedAdapter]], wanted: Wanted, reporter: Reporter) -> None:
    for file, used in adapters:
        for word in file.header.trigger_words:
            silent = [prompt for prompt in wanted.prompts if not has_word(prompt, word)]
            if silent:
                reporter.warn(f"{used.name} was trained with the word {word!r}, which {len(silent)} prompts do not say")
