"""Pictures on request: `finetune sample`. A base, adapters and prompts become PNGs that say how they were made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from finetune.config import ModelConfig
from finetune.devices import on_device
from finetune.errors import ConfigError, DataError
from finetune.families import Components
from finetune.prompt_lines import parse_prompt
from finetune.run_files import load_run
from finetune.sampling.apply import adapter_applied
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet, seeds_label
from finetune.sampling.guides import Guides
from finetune.sampling.merging import adapter_digest
from finetune.sampling.papers import Shot, same_picture, save
from finetune.sampling.wanted import ROLES, Wanted
from finetune.storage import disk_errors, sha256_file
from finetune.studio import Studio, adapter_path, open_studio
from finetune.tracking import Reporter


@dataclass(frozen=True)
class _Job:
    shot: Shot
    path: Path
    row: int
    column: int


NONE: Mapping[str, str] = MappingProxyType({})


def sample(model: ModelConfig, wanted: Wanted, output: Path, reporter: Reporter | None = None) -> list[Path]:
    """Make the pictures that are not there yet; their paths in order of row, prompt and seed.

    Several pictures also come as one sheet, sheet.png. A picture's name carries a digest of everything that decides its
    pixels, so the same request finds its own pictures and overwrites no other.

    Raises:
        UserError: naming everything that is wrong with the request at once.
    """
    reporter = reporter or Reporter()
    if problems := [*wanted.problems(), *_place_problems(output)]:
        raise ConfigError("No picture can be made:", problems)
    studio = open_studio(model, wanted, reporter)
    jobs = _jobs(studio, model, wanted, output)
    missing = [job for job in jobs if not same_picture(job.path, job.shot)]
    _tell(reporter, studio, wanted, jobs, missing, output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        if missing:
            _make(studio, wanted, missing, reporter)
        if len(jobs) > 1:
            _sheet(jobs, wanted, output / "sheet.png")
    return [job.path for job in jobs]


def sample_again(
    shot: Shot, model: ModelConfig, adapters: Sequence[Path], pictures: dict[str, Path], output: Path,
    reporter: Reporter | None = None, networks: Mapping[str, str] = NONE, merged: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Make a picture again from its papers.

    Args:
        model: the base; its weights must have the digest that the papers name.
        adapters: the files, in the papers' order; compared by their bytes.
        networks: "controlnet" and "refiner" -> where they lie; compared by their weights.
        merged: adapters merged into the base first; see `Wanted`.
        pictures: role -> the picture that was given then; compared by its bytes.

    Raises:
        ConfigError: naming everything that differs from the papers.
    """
    reporter = reporter or Reporter()
    problems = _place_problems(output)
    if len(adapters) != len(shot.adapters):
        names = ", ".join(used.name for used in shot.adapters) or "none"
        problems.append(
            f"{len(adapters)} adapters are given, the picture was made with {len(shot.adapters)}: {names}; name them "
            "in this order with --adapter FILE, or a run's own with --run FOLDER."
        )
    for path, used in zip(adapters, shot.adapters, strict=False):
        if adapter_digest(adapter_path(path)) != used.sha256:
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
        strength=shot.strength, controlnet=networks.get("controlnet"), upscale=shot.upscale,
        control_scale=shot.control_scale, control_from=shot.control_from,
        refiner=(networks.get("refiner", shot.refiner), shot.refiner_start or 0) if shot.refiner else None,
        upscale_strength=shot.upscale_strength or 0.5, image=pictures.get("image"), mask=pictures.get("mask"),
        control=pictures.get("control"),
    )  # fmt: skip
    chosen = ("dtype", "clip_skip", "prompt_chunks", "prediction", "zero_terminal_snr", "t5_tokens")
    model = model.model_copy(update={name: getattr(shot, name) for name in chosen})
    studio = open_studio(model, wanted, reporter)
    for part in ("controlnet", "refiner"):
        if studio.digests.get(part) != shot.pictures.get(part):
            raise ConfigError(f"The {part} is not the one it was made with; name the right one with --{part}.")
    if studio.components.digest != shot.base_digest:
        raise ConfigError(
            f"The base {model.base} is not the one it was made with ({shot.base}): its weights have another digest. "
            "Name the right one with --base."
        )
    job = replace(_jobs(studio, model, wanted, output)[0], shot=shot)
    job = replace(job, path=output / f"{_slug(shot)}.png")
    if job.path.exists():
        raise ConfigError(f"{job.path} is there already and is not overwritten; name another folder with --output.")
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        _make(studio, wanted, [job], reporter)
    return job.path


def _place_problems(output: Path) -> list[str]:
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return [] if there.is_dir() else [f"{there} is a file, so {output} can be no folder; name another with --output."]


def model_of(base: str, run: Path | None) -> tuple[ModelConfig, list[Path], tuple[str, ...]]:
    """The base to draw with, the run's own adapter, and what was merged into the base before it was trained."""
    if run is None:
        return ModelConfig(base=base or "demo"), [], ()
    trained = load_run(run)
    model = trained.model.model_copy(update={"base": base}) if base else trained.model
    return model, [run], tuple(trained.adapter.merge_first) if trained.adapter else ()


def _jobs(studio: Studio, model: ModelConfig, wanted: Wanted, output: Path) -> list[_Job]:
    family, components = studio.family, studio.components
    side = family.native_resolution(components)
    usual: dict[str, Any] = {
        "negative_prompt": wanted.negative_prompt, "seed": wanted.seed, "steps": wanted.steps,
        "guidance_scale": family.usual_guidance if wanted.guidance_scale is None else wanted.guidance_scale,
        "width": wanted.width or side, "height": wanted.height or side,
    }  # fmt: skip
    steered = studio.guides.image is not None
    jobs = []
    for level, factor in enumerate(wanted.strengths):
        used = tuple(
            mark.model_copy(update={"strength": mark.strength * factor}) for _, mark in studio.adapters
        )
        for column, line in enumerate(wanted.prompts):
            prompt, own_settings = parse_prompt(line)
            settings = usual | own_settings
            first = settings.pop("seed")
            for number in range(wanted.count):
                shot = Shot(
                    prompt=prompt, seed=first + number, **settings, scheduler=wanted.scheduler, base=components.source,
                    base_digest=components.digest, dtype=studio.dtype, clip_skip=model.clip_skip,
                    prediction=model.prediction, zero_terminal_snr=model.zero_terminal_snr, t5_tokens=model.t5_tokens,
                    prompt_chunks=model.prompt_chunks, adapters=used, pictures=studio.digests,
                    strength=studio.guides.strength if steered else None,
                    control_scale=studio.guides.control_scale if wanted.controlnet else None,
                    control_from=wanted.control_from, upscale=wanted.upscale,
                    refiner=studio.refiner.components.source if studio.refiner else None,
                    refiner_start=studio.refiner.start if studio.refiner else None,
                    upscale_strength=wanted.upscale_strength if wanted.upscale else None,
                )  # fmt: skip
                path = output / f"{_slug(shot)}.png"
                jobs.append(_Job(shot, path, level * wanted.count + number, column))
    return jobs


def _slug(shot: Shot) -> str:
    words = re.sub(r"[^\w-]+", "-", shot.prompt, flags=re.ASCII).strip("-_").lower()[:48].strip("-_")
    return f"{words or 'picture'}-s{shot.seed}-{shot.digest()[:8]}"


def _tell(
    reporter: Reporter, studio: Studio, wanted: Wanted, jobs: list[_Job], missing: list[_Job], output: Path
) -> None:
    shots = [job.shot for job in jobs]
    sizes = dict.fromkeys(f"{shot.width} x {shot.height}" for shot in shots)
    looks = dict.fromkeys(f"{shot.steps} steps, guidance {shot.guidance_scale:g}" for shot in shots)
    rows = [
        ("Base model", f"{studio.components.source} ({studio.family.name}), {studio.dtype} on {studio.device.type}"),
        *(("Adapter", f"{used.name} at {used.strength:g}") for _, used in studio.adapters),
        *(
            (("Refiner", f"{shots[0].refiner} draws the last {1 - studio.refiner.start:.0%} of the schedule"),)
            if studio.refiner
            else ()
        ),
        ("Pictures", f"{len(missing)} to make" + (f", {len(jobs) - len(missing)} there" if missing != jobs else "")),
        ("Size", " and ".join(sizes) + (f", then x {wanted.upscale:g}" if wanted.upscale else "")),
        ("Sampler", f"{wanted.scheduler or 'as the base has it'}, {' and '.join(looks)}"),
        ("Folder", str(output)),
    ]
    reporter.table("Plan", rows)


def _make(studio: Studio, wanted: Wanted, jobs: list[_Job], reporter: Reporter) -> None:
    """Render in batches of shots that differ in prompt and seed only, and save each picture as it comes."""
    bases = [studio.components, *([studio.refiner.components] if studio.refiner is not None else [])]
    networks = [
        network for base in bases for network in (base.drawing() if wanted.low_memory else base.modules().values())
    ]
    networks += [studio.guides.controlnet] if studio.guides.controlnet is not None else []
    done = 0
    with ExitStack() as stack:
        advance = stack.enter_context(reporter.progress("Drawing", len(jobs)))
        stack.enter_context(on_device(networks, studio.device))
        if wanted.low_memory:
            _save_memory(studio.components)
        for used, group in groupby(jobs, key=lambda job: job.shot.adapters):
            with ExitStack() as attached:
                for (file, _), mark in zip(studio.adapters, used, strict=True):
                    attached.enter_context(adapter_applied(studio.family, studio.components, file, mark.strength))
                for batch in _batches(group, 1 if wanted.upscale is not None else wanted.batch_size):
                    for job, image in zip(batch, _draw(studio, wanted, batch), strict=True):
                        save(image, job.shot, job.path)
                        done += 1
                        advance(done, job.path.name)


def _batches(jobs: Iterable[_Job], size: int) -> Iterator[list[_Job]]:
    """Jobs in their order, up to `size` together that differ in nothing but prompt and seed."""
    for _, alike in groupby(jobs, key=lambda job: job.shot.model_copy(update={"prompt": "", "seed": 0})):
        same = list(alike)
        yield from (same[first : first + size] for first in range(0, len(same), size))


def _draw(studio: Studio, wanted: Wanted, batch: list[_Job]) -> list[Image.Image]:
    shot = batch[0].shot
    common: dict[str, Any] = {
        "seeds": [job.shot.seed for job in batch], "steps": shot.steps, "guidance_scale": shot.guidance_scale,
        "negative_prompt": shot.negative_prompt, "scheduler": shot.scheduler, "batch_size": len(batch),
        "emphasis": True,
    }  # fmt: skip
    prompts = [job.shot.prompt for job in batch]
    images = generate(
        studio.family, studio.components, prompts, height=shot.height, width=shot.width, guides=studio.guides,
        refiner=studio.refiner, **common,
    )  # fmt: skip
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
    cells: dict[int, list[_Job]] = {}
    for job in jobs:
        cells.setdefault(job.row, []).append(job)
    rows = []
    for row, shown in sorted(cells.items()):
        factor = wanted.strengths[row // wanted.count]
        note = f"adapters x {factor:g}" if len(wanted.strengths) > 1 else ""
        rows.append(Row(seeds_label(job.shot.seed for job in shown), [_opened(job.path) for job in shown], note))
    contact_sheet(rows, columns=list(wanted.prompts)).save(path)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read for the sheet: {error}.") from None


__all__ = ["Wanted", "model_of", "sample", "sample_again"]
