"""Sample sheets: the same prompts and seeds before, during and after training, so that eyes can follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune.adapters import AdapterSet
from finetune.config import SamplesConfig
from finetune.families.base import Components, ModelFamily
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet
from finetune.storage import read_json, write_json
from finetune.tracking import Reporter
from finetune.training.devices import on_device


class SampleSheets:
    """Renders samples/step-000000/000-0.png ... and samples/step-000000.png, the sheet."""

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

    def render(self, step: int, reporter: Reporter, *, only_if_missing: bool = False) -> Path:
        """Render every prompt with the adapter as it is after `step` steps (step 0: the base model); the
        sheet's path.
        """
        sheet = self._folder / f"step-{step:06d}.png"
        questions = self._folder / sheet.stem / "questions.json"
        if only_if_missing and questions.is_file() and read_json(questions) == self._questions(step):
            return sheet
        seeds = range(self._samples.per_prompt)
        jobs = [(i, prompt, seed) for i, prompt in enumerate(self._samples.prompts) for seed in seeds]
        with (
            reporter.progress(f"Rendering samples (step {step})", len(jobs)) as advance,
            on_device(list(self._components.modules().values()), self._device),
        ):
            images = generate(
                self._family,
                self._components,
                [prompt for _, prompt, _ in jobs],
                seeds=[seed for _, _, seed in jobs],
                steps=self._samples.inference_steps,
                guidance_scale=self._samples.guidance_scale,
                negative_prompt=self._samples.negative_prompt,
                height=self._resolution,
                width=self._resolution,
                progress=lambda done, total: advance(done * len(jobs) // total, ""),
            )
        folder = self._folder / sheet.stem
        folder.mkdir(parents=True, exist_ok=True)
        for (i, _, seed), image in zip(jobs, images, strict=True):
            image.save(folder / f"{i:03d}-{seed}.png")
        self._sheet(step, images).save(sheet)
        write_json(questions, self._questions(step))
        return sheet

    def _questions(self, step: int) -> dict[str, Any]:
        """Written after a sheet's pictures: prompts, settings, another base or run since make a new sheet."""
        asked = {**self._samples.model_dump(mode="json", exclude={"every"}), "resolution": self._resolution}
        return {**asked, "base": self._components.digest, "run": self._run_digest if step else ""}

    def _sheet(self, step: int, images: list[Image.Image]) -> Image.Image:
        count = len(self._samples.prompts)
        rows = [
            Row(label=f"seed {seed}", images=images[seed :: self._samples.per_prompt][:count])
            for seed in range(self._samples.per_prompt)
        ]
        title = f"After {step} steps" if step else "The base model"
        return contact_sheet(rows, columns=list(self._samples.prompts), title=title)
