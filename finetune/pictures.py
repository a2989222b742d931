"""Pictures on request: `finetune sample`. A base, adapters and prompts become PNGs that say how they were made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn

from finetune.adapters import AdapterFile
from finetune.adapters.files import ADAPTER_FILE
from finetune.config import ModelConfig, has_word
from finetune.errors import ConfigError, DataError
from finetune.families import Components, ModelFamily, load_model
from finetune.families.folders import names_folder
from finetune.run_files import load_run
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet
from finetune.sampling.guides import Guides
from finetune.sampling.merging import adapter_digest, merge_first, read_adapter
from finetune.sampling.papers import Shot, UsedAdapter, same_picture, save
from finetune.sampling.wanted import ROLES, Wanted
from finetune.storage import sha256_file, tensor_bytes
from finetune.tracking import Reporter
from finetune.training.build import DTYPES, auto_dtype
from finetune.training.devices import on_device


@dataclass
class _Studio:
    """What is loaded."""

    family: ModelFamily
    components: Components
    dtype: str
    device: torch.device
    adapters: list[tuple[AdapterFile, UsedAdapter]]
    guides: Guides
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    shot: Shot
    path: Path
    row: int
    column: int


def sample(model: ModelConfig, wanted: Wanted, output: Path, reporter: Reporter | None = None) -> list[Path]:
    """Make the pictures that are not there yet; their paths in order of row, prompt and seed.

    Several pictures also come as one sheet, sheet.png. A picture's name carries a digest of everything that decides its
    pixels, so the same request finds its own pictures and overwrites no other.

    Raises:
        UserError: naming everything that is wrong with the request at once.
    """
    reporter = reporter or Reporter()
    if problems := wanted.problems():
        raise ConfigError("No picture can be made:", problems)
    studio = _open(model, wanted, reporter)
    jobs = _jobs(studio, model, wanted, output)
    missing = [job for job in jobs if not same_picture(job.path, job.shot)]
    _tell(reporter, studio, wanted, jobs, missing, output)
    if missing:
        output.mkdir(parents=True, exist_ok=True)
        _make(studio, wanted, missing, reporter)
    if len(jobs) > 1:
        _sheet(jobs, wanted, output / "sheet.png")
    return [job.path for job in jobs]


def sample_again(
    shot: Shot, model: ModelConfig, adapters: Sequence[Path], pictures: dict[str, Path], output: Path,
    reporter: Reporter | None = None, controlnet: str | None = None, merged: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Make a picture again from its papers.

    Args:
        model: the base; its weights must have the digest that the papers name.
        adapters: the files, in the papers' order; compared by their bytes.
        merged: adapters merged into the base first; see `Wanted`.
        pictures: role -> the picture that was given then; compared by its bytes.

    Raises:
        ConfigError: naming everything that differs from the papers.
    """
    reporter = reporter or Reporter()
    problems = []
    if len(adapters) != len(shot.adapters):
        names = ", ".join(used.name for used in shot.adapters) or "none"
        problems.append(f"{len(adapters)} adapters are given, the picture was made with {len(shot.adapters)}: {names}.")
    for path, used in zip(adapters, shot.adapters, strict=False):
        if adapter_digest(_adapter_path(path)) != used.sha256:
            problems.append(f"{path} is not the {used.name} it was made with: its bytes have another SHA-256.")
    for role in ROLES:
        given = pictures.get(role)
        if (given is None) != (role not in shot.pictures):
            problems.append(f"--{role} {'is missing' if given is None else 'was not given then'}.")
        elif given is not None and sha256_file(given) != shot.pictures[role]:
            problems.append(f"{given} is not the {role} it was made with: its bytes have another SHA-256.")
    if problems:
        raise ConfigError("The picture cannot be made again:", problems)
    strengths = [used.strength for used in shot.adapters]
    wanted = Wanted(
        (shot.prompt,), shot.negative_prompt, shot.seed, 1, shot.steps, shot.guidance_scale, shot.width, shot.height,
        shot.scheduler, merge_first=merged, adapters=tuple(zip(adapters, strengths, strict=True)),
        strength=shot.strength or 0.6, controlnet=controlnet, upscale=shot.upscale,
        control_scale=1.0 if shot.control_scale is None else shot.control_scale,
        upscale_strength=shot.upscale_strength or 0.5, image=pictures.get("image"), mask=pictures.get("mask"),
        control=pictures.get("control"),
    )  # fmt: skip
    chosen = ("dtype", "clip_skip", "prompt_chunks", "prediction", "zero_terminal_snr", "t5_tokens")
    model = model.model_copy(update={name: getattr(shot, name) for name in chosen})
    studio = _open(model, wanted, reporter)
    if studio.digests.get("controlnet") != shot.pictures.get("controlnet"):
        raise ConfigError("The ControlNet is not the one it was made with; name the right one with --controlnet.")
    if studio.components.digest != shot.base_digest:
        raise ConfigError(
            f"The base {model.base} is not the one it was made with ({shot.base}): its weights have another digest. "
            "Name the right one with --base."
        )
    job = replace(_jobs(studio, model, wanted, output)[0], shot=shot)
    job = replace(job, path=output / f"{_slug(shot)}.png")
    if job.path.exists():
        raise ConfigError(f"{job.path} is there already and is not overwritten; name another folder with --output.")
    output.mkdir(parents=True, exist_ok=True)
    _make(studio, wanted, [job], reporter)
    return job.path


def model_of(base: str, run: Path | None) -> tuple[ModelConfig, list[Path], tuple[str, ...]]:
    """The base to draw with, the run's own adapter, and what was merged into the base before it was trained."""
    if run is None:
        return ModelConfig(base=base or "demo"), [], ()
    trained = load_run(run)
    model = trained.model.model_copy(update={"base": base}) if base else trained.model
    return model, [run], tuple(trained.adapter.merge_first) if trained.adapter else ()


def _open(model: ModelConfig, wanted: Wanted, reporter: Reporter) -> _Studio:
    pictures, problems = _pictures(wanted)
    adapters = []
    names = names_folder(model.base)
    for path, strength in wanted.adapters:
        file = _adapter_path(path)
        used = UsedAdapter(name=file.name, sha256=adapter_digest(file), strength=strength)
        adapters.append((read_adapter(file, names), used))
    if problems:
        raise ConfigError("No picture can be made:", problems)
    dtype = auto_dtype() if model.dtype == "auto" else model.dtype
    with reporter.progress("Loading the base model", 1) as advance:
        # keep: packed weights are for training; adapters are applied to whole ones.
        family, components = load_model(model, DTYPES[dtype], whole=True)
        merge_first(wanted.merge_first, family, components, names)
        advance(1, "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guides = Guides(
        pictures.get("image"), wanted.strength, pictures.get("mask"), pictures.get("control"),
        _controlnet(wanted.controlnet, DTYPES[dtype]) if wanted.controlnet else None, wanted.control_scale,
    )  # fmt: skip
    digests = {role: sha256_file(path) for role in ROLES if (path := getattr(wanted, role)) is not None}
    if guides.controlnet is not None:
        digests["controlnet"] = _weights_digest(guides.controlnet)
    _warn_of_triggers(adapters, wanted, reporter)
    for read, used in adapters:
        if read.header.base_digest and read.header.base_digest != components.digest:
            reporter.note(f"{used.name} was made on another base ({read.header.base}); results may differ from its own")
    return _Studio(family, components, dtype, device, adapters, guides, digests)


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


def _adapter_path(path: Path) -> Path:
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
            f"--controlnet {name} cannot be loaded: {str(error).splitlines()[0]}. Name a diffusers ControlNet folder "
            "with config.json and safetensors, or a hub id."
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


def _jobs(studio: _Studio, model: ModelConfig, wanted: Wanted, output: Path) -> list[_Job]:
    family, components = studio.family, studio.components
    own = family.native_resolution(components)
    steered = studio.guides.image is not None
    jobs = []
    for level, factor in enumerate(wanted.strengths):
        used = tuple(
            mark.model_copy(update={"strength": mark.strength * factor}) for _, mark in studio.adapters
        )
        for column, prompt in enumerate(wanted.prompts):
            for number in range(wanted.count):
                shot = Shot(
                    prompt=prompt, negative_prompt=wanted.negative_prompt, seed=wanted.seed + number,
                    steps=wanted.steps, guidance_scale=_guidance(family, wanted), width=wanted.width or own,
                    height=wanted.height or own, scheduler=wanted.scheduler, base=components.source,
                    base_digest=components.digest, dtype=studio.dtype, clip_skip=model.clip_skip,
                    prediction=model.prediction, zero_terminal_snr=model.zero_terminal_snr, t5_tokens=model.t5_tokens,
                    prompt_chunks=model.prompt_chunks, adapters=used, pictures=studio.digests,
                    strength=wanted.strength if steered else None,
                    control_scale=wanted.control_scale if wanted.controlnet else None, upscale=wanted.upscale,
                    upscale_strength=wanted.upscale_strength if wanted.upscale else None,
                )  # fmt: skip
                path = output / f"{_slug(shot)}.png"
                jobs.append(_Job(shot, path, level * wanted.count + number, column))
    return jobs


def _guidance(family: ModelFamily, wanted: Wanted) -> float:
    return family.usual_guidance if wanted.guidance_scale is None else wanted.guidance_scale


def _slug(shot: Shot) -> str:
    words = re.sub(r"[^\w-]+", "-", shot.prompt, flags=re.ASCII).strip("-_").lower()[:48].strip("-_")
    return f"{words or 'picture'}-s{shot.seed}-{shot.digest()[:8]}"


def _tell(
    reporter: Reporter, studio: _Studio, wanted: Wanted, jobs: list[_Job], missing: list[_Job], output: Path
) -> None:
    shot = jobs[0].shot
    rows = [
        ("Base model", f"{studio.components.source} ({studio.family.name}), {studio.dtype} on {studio.device.type}"),
        *(("Adapter", f"{used.name} at {used.strength:g}") for _, used in studio.adapters),
        ("Pictures", f"{len(missing)} to make" + (f", {len(jobs) - len(missing)} there" if missing != jobs else "")),
        ("Size", f"{shot.width} x {shot.height}" + (f", then x {wanted.upscale:g}" if wanted.upscale else "")),
        ("Sampler", f"{shot.scheduler or 'as the base has it'}, {shot.steps} steps, guidance {shot.guidance_scale:g}"),
        ("Folder", str(output)),
    ]
    reporter.table("Plan", rows)


def _make(studio: _Studio, wanted: Wanted, jobs: list[_Job], reporter: Reporter) -> None:
    """Render in batches of shots that differ in prompt and seed only, and save each picture as it comes."""
    single = wanted.upscale is not None
    size = 1 if single else wanted.batch_size
    batches: list[list[_Job]] = []
    for job in jobs:
        if batches and len(batches[-1]) < size and batches[-1][0].shot.adapters == job.shot.adapters:
            batches[-1].append(job)
        else:
            batches.append([job])
    networks = [*studio.components.modules().values()]
    networks += [studio.guides.controlnet] if studio.guides.controlnet is not None else []
    done = 0
    with ExitStack() as stack:
        advance = stack.enter_context(reporter.progress("Drawing", len(jobs)))
        stack.enter_context(on_device(networks, studio.device))
        if wanted.low_memory:
            _save_memory(studio.components)
        for batch in batches:
            for job, image in zip(batch, _draw(studio, wanted, batch), strict=True):
                save(image, job.shot, job.path)
                done += 1
                advance(done, job.path.name)


def _draw(studio: _Studio, wanted: Wanted, batch: list[_Job]) -> list[Image.Image]:
    shot = batch[0].shot
    common: dict[str, Any] = {
        "seeds": [job.shot.seed for job in batch], "steps": shot.steps, "guidance_scale": shot.guidance_scale,
        "negative_prompt": shot.negative_prompt, "scheduler": shot.scheduler, "batch_size": len(batch),
        "adapters": [(file, used.strength) for (file, _), used in zip(studio.adapters, shot.adapters, strict=True)],
        "emphasis": True,
    }  # fmt: skip
    prompts = [job.shot.prompt for job in batch]
    images = generate(
        studio.family, studio.components, prompts, height=shot.height, width=shot.width, guides=studio.guides, **common
    )
    if shot.upscale is None:
        return images
    assert wanted.upscale_strength is not None, "has a default"
    multiple = studio.family.bucket_multiple if shot.width > studio.family.bucket_multiple * 4 else 8
    height, width = (round(side * shot.upscale / multiple) * multiple for side in (shot.height, shot.width))
    second = Guides(image=images[0], strength=shot.upscale_strength or wanted.upscale_strength)
    return generate(studio.family, studio.components, prompts, height=height, width=width, guides=second, **common)


def _save_memory(components: Components) -> None:
    vae: Any = components.vae
    vae.enable_slicing()
    vae.enable_tiling()


def _sheet(jobs: list[_Job], wanted: Wanted, path: Path) -> None:
    columns = list(wanted.prompts)
    cells: dict[int, list[Image.Image | None]] = {}
    for job in jobs:
        try:
            with Image.open(job.path) as image:
                cells.setdefault(job.row, [None] * len(columns))[job.column] = image.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"{job.path} cannot be read for the sheet: {error}.") from None
    rows = []
    for row, images in sorted(cells.items()):
        level, number = divmod(row, wanted.count)
        note = f"adapters x {wanted.strengths[level]:g}" if len(wanted.strengths) > 1 else ""
        rows.append(Row(label=f"seed {wanted.seed + number}", images=images, note=note))
    contact_sheet(rows, columns=columns).save(path)


__all__ = ["Wanted", "model_of", "sample", "sample_again"]
