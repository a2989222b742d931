"""Sample sheets: the same prompts and seeds before, during and after training, so that eyes can follow."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_tools.errors import counted
from finetune.adapters import AdapterSet
from finetune.config import SamplesConfig
from finetune.devices import on_device
from finetune.families.base import Components, ModelFamily
from finetune.prompt_lines import parse_prompt
from finetune.sampling.generate import Progress, generate
from finetune.sampling.grid import Row, contact_sheet, seeds_label
from finetune.storage import read_json, write_json
from finetune.tracking import Reporter

MOST_ROWS = 12
"""Of steps.png: more are too much for an eye, and for the time between two steps."""


@dataclass(frozen=True)
class _Job:
    """A picture: `look` is what `generate` is told besides prompt and seed."""

    prompt: str
    seed: int
    look: dict[str, Any]
    name: str


class SampleSheets:
    """Renders samples/step-000000/000-0.png ..., samples/step-000000.png, the sheet, and steps.png, several of them."""

    def __init__(
        self,
        samples: SamplesConfig,
        family: ModelFamily,
        components: Components,
        adapters: AdapterSet,
        resolution: int,
        folder: Path,
        device: torch.device,
        run_digest: str,
    ) -> None:
        """Remember what to render with; `resolution` is the side of a square sample in pixels."""
        self._run_digest = run_digest
        self._samples = samples
        self._family = family
        self._components = components
        self._adapters = adapters
        self._resolution = resolution
        self._folder = folder
        self._device = device

    def forget(self, after: int) -> None:
        """Take away the sheets of steps after `after`: they are done again, and maybe with other pictures."""
        for folder in self._folder.glob("step-*/"):
            if _step(folder) > after:
                folder.with_suffix(".png").unlink(missing_ok=True)
                shutil.rmtree(folder)
                (self._folder / "steps.png").unlink(missing_ok=True)

    def render(self, step: int, reporter: Reporter) -> Path:
        """Render every prompt with the adapter as it is after `step` steps (step 0: the base model), unless that is
        done; the sheet's path.
        """
        sheet = self._folder / f"step-{step:06d}.png"
        questions = self._folder / sheet.stem / "questions.json"
        if questions.is_file() and read_json(questions) == self._questions(step):
            if not (self._folder / "steps.png").is_file():
                self._timeline(self._jobs())
            return sheet
        jobs = self._jobs()
        alike: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        for number, job in enumerate(jobs):
            alike.setdefault(tuple(job.look.items()), []).append(number)
        images: dict[int, Image.Image] = {}
        with (
            reporter.progress(f"Rendering samples (step {step})", len(jobs)) as advance,
            on_device(self._components.drawing(), self._device),
        ):
            for look, numbers in alike.items():
                drawn = generate(
                    self._family,
                    self._components,
                    [jobs[number].prompt for number in numbers],
                    seeds=[jobs[number].seed for number in numbers],
                    progress=_onward(advance, len(images), len(numbers)),
                    **dict(look),
                )
                images.update(zip(numbers, drawn, strict=True))
        folder = self._folder / sheet.stem
        folder.mkdir(parents=True, exist_ok=True)
        for number, job in enumerate(jobs):
            images[number].save(folder / job.name)
        self._sheet(step, jobs, [images[number] for number in range(len(jobs))]).save(sheet)
        write_json(questions, self._questions(step))
        self._timeline(jobs)
        return sheet

    def _jobs(self) -> list[_Job]:
        """Prompt by prompt, with its seeds."""
        usual = {
            "negative_prompt": self._samples.negative_prompt,
            "width": self._resolution,
            "height": self._resolution,
            "guidance_scale": self._samples.guidance_scale,
            "steps": self._samples.inference_steps,
        }
        jobs = []
        for number, line in enumerate(self._samples.prompts):
            prompt, own = parse_prompt(line)
            first = own.pop("seed", 0)
            for seed in range(first, first + self._samples.per_prompt):
                jobs.append(_Job(prompt, seed, usual | own, _name(number, seed)))
        return jobs

    def _questions(self, step: int) -> dict[str, Any]:
        """Written after a sheet's pictures: prompts, settings, another base or run since make a new sheet."""
        asked = {**self._samples.model_dump(mode="json", exclude={"every"}), "resolution": self._resolution}
        return {**asked, "base": self._components.digest, "run": self._run_digest if step else ""}

    def _sheet(self, step: int, jobs: list[_Job], images: list[Image.Image]) -> Image.Image:
        every = self._samples.per_prompt
        groups = [slice(first, None, every) for first in range(every)]
        rows = [Row(seeds_label(job.seed for job in jobs[group]), images[group]) for group in groups]
        title = f"After {counted(step, 'step')}" if step else "The base model"
        return contact_sheet(rows, columns=list(self._samples.prompts), title=title)

    def _timeline(self, jobs: list[_Job]) -> None:
        """samples/steps.png: the first seed of each prompt, a row per step, of many steps MOST_ROWS spread evenly.

        Prompts that a step was not yet asked leave their places empty.
        """
        first = jobs[:: self._samples.per_prompt]
        found = {
            questions.parent: self._tiles(questions, first)
            for questions in sorted(self._folder.glob("step-*/questions.json"))
        }
        shown = [folder for folder, tiles in found.items() if any(tiles)]
        if len(shown) > 1:
            rows = [
                Row(_label(folder), [_opened(tile) if tile else None for tile in found[folder]])
                for folder in _spread(shown)
            ]
            contact_sheet(rows, columns=list(self._samples.prompts)).save(self._folder / "steps.png")

    def _tiles(self, questions: Path, first: list[_Job]) -> list[Path | None]:
        """The pictures of a step that answer today's prompts; none where they were drawn with other settings."""
        asked, now = read_json(questions), self._questions(0)
        if any(asked.get(name) != now[name] for name in now.keys() - {"prompts", "per_prompt", "run"}):
            return []
        places = {line: number for number, line in enumerate(asked["prompts"])}
        tiles = []
        for line, job in zip(self._samples.prompts, first, strict=True):
            tile = questions.parent / _name(places[line], job.seed) if line in places else None
            tiles.append(tile if tile and tile.is_file() else None)
        return tiles


def _name(prompt: int, seed: int) -> str:
    return f"{prompt:03d}-{seed}.png"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _label(folder: Path) -> str:
    return f"step {_step(folder)}" if _step(folder) else "base model"


def _spread(folders: Sequence[Path]) -> list[Path]:
    """The first, the last, and so many evenly between that there are MOST_ROWS at most."""
    last = len(folders) - 1
    rows = min(len(folders), MOST_ROWS)
    return [folders[round(row * last / max(rows - 1, 1))] for row in range(rows)]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _onward(advance: Callable[[int, str], None], before: int, pictures: int) -> Progress:
    """Denoising steps of one group of pictures, as progress over all of them."""
    return lambda done, total: advance(before + done * pictures // total, "")
