"""What `finetune sample` draws with, loaded and checked: base, adapters, ControlNet, refiner, pictures that steer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import nn

from data_tools.errors import counted
from finetune.adapters import AdapterFile
from finetune.config import ModelConfig, has_word
from finetune.dtypes import DTYPES
from finetune.errors import ConfigError
from finetune.families import Components, ModelFamily, load_model, network_configs
from finetune.families.controlnets import find_controlnet
from finetune.families.original_keys import config_of
from finetune.families.places import names_folder
from finetune.sampling.depth import USUAL, depth_map
from finetune.sampling.guides import Guides
from finetune.sampling.merging import merge_first, read_adapter
from finetune.sampling.papers import UsedAdapter, adapter_digest, adapter_path
from finetune.sampling.speed import check_compiler
from finetune.sampling.stages import Refiner
from finetune.sampling.wanted import DEPTH, ROLES, STRENGTH, Wanted
from finetune.storage import sha256_file, tensor_bytes
from finetune.tracking import Reporter
from finetune.training.build import auto_dtype


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.compile:
        check_compiler(device)
    pictures, problems = _pictures(wanted)
    if wanted.controlnet is not None:
        try:
            networks = network_configs(model)
            problems += find_controlnet(wanted.controlnet, networks).problems(networks)
        except ConfigError as error:
            problems += error.problems or [error.headline]
    adapters = []
    names = names_folder(model.base)
    for path, strength in wanted.adapters:
        file = adapter_path(path)
        used = UsedAdapter(name=file.name, sha256=adapter_digest(file), strength=strength)
        adapters.append((read_adapter(file, names), used))
    if problems:
        raise ConfigError("No picture can be made:", problems)
    digests = {role: sha256_file(path) for role in ROLES if (path := getattr(wanted, role)) is not None}
    if wanted.control_from == DEPTH:
        with reporter.progress("Estimating depth", 1) as advance:
            pictures["control"], digests["depth_model"] = depth_map(pictures["control"], wanted.depth_model or USUAL)
            advance(1, "")
    dtype = auto_dtype() if model.dtype == "auto" else model.dtype
    with reporter.progress("Loading the base model", 1) as advance:
        # keep: packed weights are for training; adapters are applied to whole ones.
        family, components = load_model(model, DTYPES[dtype], whole=True)
        merge_first(wanted.merge_first, family, components, names)
        refiner = _refiner(wanted, model, dtype)
        advance(1, "")
    strength = STRENGTH if wanted.strength is None else wanted.strength
    guides = Guides(
        pictures.get("image"), strength, pictures.get("mask"), pictures.get("control"),
        None if wanted.control_from == DEPTH else wanted.control_from,
        _controlnet(wanted.controlnet, components, DTYPES[dtype]) if wanted.controlnet else None,
        1.0 if wanted.control_scale is None else wanted.control_scale,
    )  # fmt: skip
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


def _controlnet(name: str, components: Components, dtype: torch.dtype) -> nn.Module:
    """The ControlNet, once the base is there: a hub id's configuration is not known before."""
    networks = {part: config_of(network) for part, network in components.modules().items()}
    found = find_controlnet(name, networks)
    if problems := found.problems(networks):
        raise ConfigError("No picture can be made:", problems)
    return found.load(dtype)


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    if getattr(module.config, "global_pool_conditions", False):
        digest.update(b"pooled")
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _warn_of_triggers(adapters: list[tuple[AdapterFile, UsedAdapter]], wanted: Wanted, reporter: Reporter) -> None:
    for file, used in adapters:
        for word in file.header.trigger_words:
            silent = [prompt for prompt in wanted.prompts if not has_word(prompt, word)]
            if silent:
                those = counted(len(silent), "prompt does", "prompts do")
                reporter.warn(f"{used.name} was trained with the word {word!r}, which {those} not say")
