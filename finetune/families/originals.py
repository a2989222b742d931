"""Base models as single files in the original layout: what A1111, ComfyUI and kohya call a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from data_tools.errors import counted
from finetune.demo import BASE_DIR
from finetune.errors import ConfigError
from finetune.families import skeleton
from finetune.families.base import ModelFamily
from finetune.families.choices import Choices
from finetune.families.detect import Detection, detect
from finetune.families.parts import Loaded, Replacement, replaced_configs, replaced_digests, replacements
from finetune.families.places import DEMO
from finetune.families.said import Said, settled
from finetune.families.single_file import SHOWN, Filler, part_digest
from finetune.families.skeleton import Skeleton
from finetune.header import Header, read_header
from finetune.storage import sha256_weights


def load(families: Mapping[str, ModelFamily], path: Path, dtype: torch.dtype | None, choices: Choices) -> Loaded:
    """Every network of a single file in `dtype`, the autoencoder in fp32; what the file lacks comes from `choices`.

    Raises:
        ConfigError: if the file does not exist, is of no family here, lacks parts, or does not fit its configuration;
            every misfit is listed.
    """
    if not path.is_file():
        raise ConfigError(f"model.base={path} does not exist; check the spelling.")
    header = read_header(path)
    found = detect(header)
    family = families[found.family]
    folder = choices.skeleton or of_embedded(header)
    shape = skeleton.of_folder(folder) if folder else shipped(family, found, choices)
    said = Said(found.prediction, found.zero_terminal_snr, "; ".join(found.reasons), _must_say(family, header, found))
    scheduler = settled(said, shape.scheduler, path.name, choices)
    others = replacements(family, choices, shape.networks, dtype or torch.float32)
    filler = Filler(header)
    networks, notes = _networks(family, header, filler, shape, others, dtype)
    lost = [n for n in (family.denoiser, "vae", *family.text_encoders) if n not in networks]
    missing = [name for name in lost if name not in family.optional_text_encoders]
    if missing:
        raise ConfigError(f"{path.name} is not a whole base model:", [_where(name) for name in missing])
    unread = [] if filler.problems else filler.leftovers()
    if unread:
        filler.problems.append(
            f"{counted(len(unread), 'tensor belongs', 'tensors belong')} to nothing that is loaded, e.g. "
            f"{', '.join(unread[:SHOWN])}"
        )
    if filler.problems:
        raise ConfigError(
            f"{path.name} was taken for {found.family} ({'; '.join(found.reasons)}), but does not fit it. If it is a "
            "pruned or widened variant, set model.skeleton to a diffusers folder with its configurations (in a "
            "recipe, or by --set model.skeleton=FOLDER):",
            filler.problems[: 2 * SHOWN],
        )
    tokenizers = {
        name: skeleton.tokenizer(shape.tokenizers[name], name) for name in family.text_encoders if name in networks
    }
    # keep: all that can be wrong is known by now, and reading takes minutes.
    filler.fill()
    own = sha256_weights(path)
    configs = {name: shape.networks[name] for name in networks} | replaced_configs(others)
    return Loaded(
        family=family,
        networks=networks,
        configs=configs,
        tokenizers=tokenizers,
        scheduler=scheduler,
        pipeline=shape.pipeline,
        digests={name: part_digest(own, name, configs[name]) for name in networks} | replaced_digests(others),
        notes=tuple(notes),
    )


def of_embedded(header: Header) -> Path | None:
    """The folder with the embedded base's configurations, if a file says that it was made from that one."""
    return BASE_DIR if header.metadata.get("finetune.base") == DEMO else None


def shipped(family: ModelFamily, found: Detection, choices: Choices) -> Skeleton:
    """The shipped configuration for a file; where shapes differ by what is predicted, the user's word counts too."""
    name = found.skeleton
    if found.prediction is None and choices.prediction == "v_prediction" and len(family.skeletons) > 1:
        name = family.skeletons[1]
    shape = skeleton.shipped(name)
    if found.inputs is None:
        return shape
    denoiser = shape.networks[family.denoiser] | {"in_channels": found.inputs}
    return replace(shape, networks=shape.networks | {family.denoiser: denoiser})


def _networks(
    family: ModelFamily,
    header: Header,
    filler: Filler,
    shape: Skeleton,
    others: Mapping[str, Replacement | None],
    dtype: torch.dtype | None,
) -> tuple[dict[str, nn.Module], list[str]]:
    """Every network the file (still empty) or the user has, and what to tell about those nobody has."""
    networks: dict[str, nn.Module] = {}
    notes = []
    for name in (family.denoiser, "vae", *family.text_encoders):
        layout = family.original[name]
        if name in others:
            part = others[name]
            networks |= {} if part is None else {name: part.network}
            filler.skip(layout)
            continue
        # keep: VAE encoders overflow in fp16 on bright pictures; the autoencoder stays in fp32.
        own = torch.float32 if name == "vae" else dtype
        found = filler.fit(name, shape.networks[name], layout, own, alone=name == family.denoiser)
        if found is not None:
            networks[name] = found
        elif name in family.optional_text_encoders:
            notes.append(
                f"the file has no {name}, so prompts are read without it, as diffusers does when it is missing; give "
                f"it as model.text_encoders.{name}"
            )
    return networks, notes


def _must_say(family: ModelFamily, header: Header, found: Detection) -> str | None:
    """Why a file of a family that exists with either prediction must be explained by the user.

    SD1 and SDXL files are epsilon unless marked: every program reads them so. SD2 was published both ways, unmarked.
    """
    ways = {skeleton.shipped(name).scheduler.get("prediction_type") for name in family.skeletons}
    if found.prediction is not None or len(ways) == 1:
        return None
    return (
        f"{header.path.name} does not say what it predicts, and {family.name} exists both ways: 768 px models predict "
        "v, 512 px ones epsilon"
    )


def _where(name: str) -> str:
    key = "model.vae" if name == "vae" else f"model.text_encoders.{name}"
    return f"it holds no {name}; give one as {key}=FILE_OR_FOLDER"
