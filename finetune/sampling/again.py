"""A picture's papers as a request: `finetune sample --from`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_tools.errors import counted
from finetune.config import ModelConfig
from finetune.errors import ConfigError
from finetune.families.places import check_place
from finetune.sampling.papers import Shot, adapter_digest, adapter_path
from finetune.sampling.wanted import ROLES, Wanted
from finetune.storage import sha256_file

SAME = ({field.name for field in fields(Wanted)} & Shot.model_fields.keys()) - {"adapters", "refiner"}
"""What a request and a picture's papers call by one name and say in one way."""
NETWORKS = ("controlnet", "depth_model", "refiner")
"""Networks beside the base whose digests the papers hold, under these names."""
OF_MODEL = ("dtype", "clip_skip", "prompt_chunks", "prediction", "zero_terminal_snr", "t5_tokens")
"""What a picture's papers say about the base beside its name and digest; fields of `ModelConfig`."""


def wanted_again(shot: Shot, adapters: Sequence[Path], given: Mapping[str, Any]) -> Wanted:
    """The request for the very picture that `shot` tells of, with the files that were used then.

    Args:
        adapters: the files, in the papers' order; compared by their bytes.
        given: fields of `Wanted` that say where things lie now: pictures, compared by their bytes, and networks, whose
            weights are compared when they are loaded.

    Raises:
        ConfigError: naming everything that differs from the papers.
    """
    problems = []
    if len(adapters) != len(shot.adapters):
        names = ", ".join(used.name for used in shot.adapters) or "none"
        problems.append(
            f"{counted(len(adapters), 'adapter is', 'adapters are')} given, the picture was made with "
            f"{len(shot.adapters)}: {names}; name them in this order with --adapter FILE, or a run's own with --run."
        )
    for path, used in zip(adapters, shot.adapters, strict=False):
        if adapter_digest(adapter_path(path)) != used.sha256:
            problems.append(f"{path} is not the {used.name} it was made with: its bytes have another SHA-256.")
    problems += [problem for role in ROLES for problem in _other_picture(role, given.get(role), shot)]
    if given.get("controlnet") is None and "controlnet" in shot.pictures:
        problems.append("--controlnet is missing.")
    problems += [
        f"--{name.replace('_', '-')} was not given then."
        for name in NETWORKS
        if given.get(name) is not None and name not in shot.pictures
    ]
    if problems:
        raise ConfigError("The picture cannot be made again:", problems)
    said = {name: value for name in SAME if (value := getattr(shot, name)) is not None}
    said["adapters"] = tuple(zip(adapters, (used.strength for used in shot.adapters), strict=True))
    said |= {name: value for name, value in given.items() if value is not None and name != "refiner"}
    if shot.refiner is not None:
        said["refiner"] = (given.get("refiner") or shot.refiner, shot.refiner_start)
    return Wanted((shot.prompt,), **said)


def _other_picture(role: str, given: Path | None, shot: Shot) -> list[str]:
    """What is wrong with a picture given for a role, or with the lack of one."""
    if (given is None) != (role not in shot.pictures):
        return [f"--{role} {'is missing' if given is None else 'was not given then'}."]
    if given is None:
        return []
    if not given.is_file():
        return [f"--{role} {given} is no file; name the picture that was given then."]
    same = sha256_file(given) == shot.pictures[role]
    return [] if same else [f"{given} is not the {role} it was made with: its bytes have another SHA-256."]


def model_again(shot: Shot, named: ModelConfig | None) -> ModelConfig:
    """The base as it was read then.

    Args:
        named: where it lies; None looks for it under the name that the papers give.

    Raises:
        ConfigError: if it is not there.
    """
    if named is None:
        named = ModelConfig(base=shot.base)
        try:
            check_place(shot.base)
        except ConfigError:
            raise ConfigError(
                f"The picture was made with the base {shot.base}, which is not here under that name; say where it lies "
                "with --base."
            ) from None
    return named.model_copy(update={name: getattr(shot, name) for name in OF_MODEL})
