"""Pictures on request: `finetune sample`. A base, adapters and prompts become PNGs that say how they were made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from data_tools.errors import counted
from finetune.adapters import AdapterFile
from finetune.config import ModelConfig
from finetune.devices import on_device
from finetune.errors import ConfigError, DataError
from finetune.families import Components
from finetune.families.holding import hold
from finetune.prompt_lines import parse_prompt
from finetune.sampling.again import NETWORKS, OF_MODEL, SAME
from finetune.sampling.apply import adapter_applied
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet, seeds_label
from finetune.sampling.guides import Guides
from finetune.sampling.papers import Shot, UsedAdapter, same_picture, save
from finetune.sampling.speed import compiled, lay_out
from finetune.sampling.wanted import Wanted, check
from finetune.storage import disk_errors
from finetune.studio import Studio, open_studio
from finetune.tracking import Reporter

ROOM = 2 * 2**30
"""Bytes for what is computed while a picture of a megapixel is drawn, roughly."""


@dataclass(frozen=True)
class _Job:
    shot: Shot
    path: Path
    row: int
    column: int


def sample(model: ModelConfig, wanted: Wanted, output: str | Path, reporter: Reporter | None = None) -> list[Path]:
    """Make the pictures that are not there yet; their paths in order of row, prompt and seed.

    Several pictures also come as one sheet, sheet.png. A picture's name carries a digest of everything that decides its
    pixels, so the same request finds its own pictures and overwrites no other.

    Raises:
        UserError: naming everything that is wrong with the request at once.
    """
    reporter, output = reporter or Reporter(), Path(output)
    check(model, wanted, output)
    studio = open_studio(model, wanted, reporter)
    jobs = _jobs(studio, model, wanted, output)
    missing = [job for job in jobs if not same_picture(job.path, job.shot)]
    _tell(reporter, studio, wanted, jobs, missing, output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        if missing:
            _make(studio, wanted, missing, reporter)
        if len(jobs) > 1:
            _sheet(studio, jobs, wanted, output / "sheet.png")
    return [job.path for job in jobs]


def sample_again(
    shot: Shot, model: ModelConfig, wanted: Wanted, output: Path, reporter: Reporter | None = None
) -> Path:
    """Make a picture again from its papers.

    Args:
        model: the base, see `again.model_again`; its weights must have the digest that the papers name.
        wanted: see `again.wanted_again`; its networks must have the weights that the papers name.

    Raises:
        ConfigError: if something is not what the papers name.
    """
    reporter = reporter or Reporter()
    check(model, wanted, output)
    path = output / f"{_slug(shot)}.png"
    if path.exists():
        raise ConfigError(f"{path} is there already and is not overwritten; name another folder with --output.")
    studio = open_studio(model, wanted, reporter)
    for part in NETWORKS:
        if studio.digests.get(part) != shot.pictures.get(part):
            name = part.replace("_", "-")
            raise ConfigError(f"The {name} is not the one it was made with; name the right one with --{name}.")
    if studio.components.digest != shot.base_digest:
        raise ConfigError(
            f"The base {model.base} is not the one it was made with ({shot.base}): its weights have another digest. "
            "Name the right one with --base."
        )
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        _make(studio, wanted, [_Job(shot, path, 0, 0)], reporter)
    return path


def _jobs(studio: Studio, model: ModelConfig, wanted: Wanted, output: Path) -> list[_Job]:
    usual = _settings(studio, model, wanted)
    jobs = []
    for level, factor in enumerate(wanted.strengths):
        used = tuple(mark.model_copy(update={"strength": mark.strength * factor}) for _, mark in studio.adapters)
        for column, line in enumerate(wanted.prompts):
            prompt, own_settings = parse_prompt(line)
            settings = usual | own_settings
            first = settings.pop("seed")
            for number in range(wanted.count):
                shot = Shot(prompt=prompt, seed=first + number, adapters=used, **settings)
                path = output / f"{_slug(shot)}.png"
                jobs.append(_Job(shot, path, level * wanted.count + number, column))
    return jobs


def _settings(studio: Studio, model: ModelConfig, wanted: Wanted) -> dict[str, Any]:
    """All that a picture's papers say but prompt and adapters, with what was left to the base filled in."""
    family, components, guides, refiner = studio.family, studio.components, studio.guides, studio.refiner
    side = family.native_resolution(components)
    usual = {"guidance_scale": family.usual_guidance, "width": side, "height": side}
    said = {name: getattr(wanted, name) for name in SAME} | {name: getattr(model, name) for name in OF_MODEL}
    return said | {name: value for name, value in usual.items() if said[name] is None} | {
        "base": components.source, "base_digest": components.digest, "dtype": studio.dtype, "pictures": studio.digests,
        "strength": guides.strength if guides.image is not None else None,
        "control_scale": guides.control_scale if wanted.controlnet else None,
        "upscale_strength": wanted.upscale_strength if wanted.upscale else None,
        "refiner": refiner.components.source if refiner else None,
        "refiner_start": refiner.start if refiner else None,
    }  # fmt: skip


def _slug(shot: Shot) -> str:
    words = re.sub(r"[^\w-]+", "-", shot.prompt, flags=re.ASCII).strip("-_").lower()[:48].strip("-_")
    strengths = [f"{used.strength:g}" for used in shot.adapters]
    told = f"-x{'x'.join(strengths)}" if set(strengths) - {"1"} else ""
    return f"{words or 'picture'}-s{shot.seed}{told}-{shot.digest()[:8]}"


def _tell(
    reporter: Reporter, studio: Studio, wanted: Wanted, jobs: list[_Job], missing: list[_Job], output: Path
) -> None:
    shots = [job.shot for job in jobs]
    sizes = dict.fromkeys(f"{shot.width} x {shot.height}" for shot in shots)
    looks = dict.fromkeys(f"{counted(shot.steps, 'step')}, guidance {shot.guidance_scale:g}" for shot in shots)
    rows = [
        ("Base model", f"{studio.components.source} ({studio.family.name}), {studio.dtype} on {studio.device.type}"),
        *(("Adapter", _strength_of(file, used)) for file, used in studio.adapters),
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


def _strength_of(file: AdapterFile, used: UsedAdapter) -> str:
    """How strongly an adapter is applied, in words; a learned word means all it learned or is not there."""
    words = ", ".join(file.header.tokens)
    if words and not file.components():
        return f"{used.name} teaches {words}, which has no strength"
    return f"{used.name} at {used.strength:g}" + (f"; its {words} always in full" if words else "")


def _make(studio: Studio, wanted: Wanted, jobs: list[_Job], reporter: Reporter) -> None:
    """Render in batches of shots that differ in prompt and seed only, and save each picture as it comes."""
    bases = [studio.components, *([studio.refiner.components] if studio.refiner is not None else [])]
    networks = [
        network for base in bases for network in (base.drawing() if wanted.low_memory else base.modules().values())
    ]
    networks += [studio.guides.controlnet] if studio.guides.controlnet is not None else []
    done = 0
    if wanted.compile:
        reporter.note("The denoiser's code is compiled with the first picture of each strength: a minute or two.")
    with ExitStack() as stack:
        advance = stack.enter_context(reporter.progress("Drawing", len(jobs)))
        if wanted.low_memory:
            free = torch.cuda.mem_get_info(studio.device)[0] if studio.device.type == "cuda" else None
            save_memory(bases, networks, free, reporter)
        stack.enter_context(on_device(networks, studio.device))
        for base in bases:
            lay_out(base.denoiser, studio.device)
        for used, group in groupby(jobs, key=lambda job: job.shot.adapters):
            with ExitStack() as attached:
                for (file, _), mark in zip(studio.adapters, used, strict=True):
                    attached.enter_context(adapter_applied(studio.family, studio.components, file, mark.strength))
                for base in bases if wanted.compile else ():
                    attached.enter_context(compiled(base.denoiser))
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
    multiple = studio.family.bucket_multiple if shot.width > studio.family.bucket_multiple * 4 else 8
    height, width = (round(side * shot.upscale / multiple) * multiple for side in (shot.height, shot.width))
    assert shot.upscale_strength is not None, "goes with upscale"
    second = Guides(image=images[0], strength=shot.upscale_strength)
    return generate(studio.family, studio.components, prompts, height=height, width=width, guides=second, **common)


def save_memory(
    bases: Sequence[Components], networks: Sequence[nn.Module], free: int | None, reporter: Reporter
) -> None:
    """Decode in slices and tiles; denoisers that do not fit beside the rest only visit the device, layer by layer.

    Args:
        networks: all that will lie on the device.
        free: bytes there; None where networks compute in main memory anyway.
    """
    for base in bases:
        vae: Any = base.vae
        vae.enable_slicing()
        vae.enable_tiling()
    needed = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    if free is None or needed + ROOM <= free:
        return
    for base in bases:
        hold(base.denoiser, "host", next(base.denoiser.parameters()).dtype)
    reporter.note(
        f"{needed / 2**30:.1f} GiB of weights do not fit beside {ROOM / 2**30:.0f} GiB for the drawing into the "
        f"{free / 2**30:.1f} GiB that are free; the denoiser stays in main memory and visits layer by layer, which is "
        "slower."
    )


def _sheet(studio: Studio, jobs: list[_Job], wanted: Wanted, path: Path) -> None:
    in_full = ", words in full" if any(file.header.tokens for file, _ in studio.adapters) else ""
    cells: dict[int, list[_Job]] = {}
    for job in jobs:
        cells.setdefault(job.row, []).append(job)
    rows = []
    for row, shown in sorted(cells.items()):
        factor = wanted.strengths[row // wanted.count]
        note = f"adapters x {factor:g}{in_full}" if len(wanted.strengths) > 1 else ""
        rows.append(Row(seeds_label(job.shot.seed for job in shown), [_opened(job.path) for job in shown], note))
    contact_sheet(rows, columns=list(wanted.prompts)).save(path)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read for the sheet: {error}.") from None


__all__ = ["sample", "sample_again"]
