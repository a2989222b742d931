"""Was the subject learned, and what else changed? Pictures are rendered and judged by the checker.

Three questions, because one alone can be fooled: is the subject there when its trigger is in the prompt; does it stay
away when the trigger is not (else the class was overwritten and the word means nothing); and do prompts that have
nothing to do with it still give what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.demo.checker import Checker
from finetune.demo.world import PROMPTS, Prompt
from finetune.families.base import Components, ModelFamily
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet
from finetune.tracking import Advance

STEPS = 20
GUIDANCE = 5.0
ORDINARY = 24
"""How many prompts about other things are asked."""


@dataclass(frozen=True)
class Figures:
    """Shares of pictures, 0 to 1.

    Attributes:
        with_trigger: show the subject when asked for it.
        without_trigger: show the subject when asked for an ordinary member of its class.
        class_kept: show an ordinary member of the class when asked for one.
        ordinary: show the object, the colour and the background that a prompt about other things names.
        pictures: how many were judged for each of the three groups of prompts.
    """

    with_trigger: float
    without_trigger: float
    class_kept: float
    ordinary: float
    pictures: tuple[int, int, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "pictures": list(self.pictures)}


@dataclass(frozen=True)
class Measured:
    """Figures and the pictures they were read from, by prompt, in the order of `prompts_of`."""

    figures: Figures
    pictures: list[Image.Image]


def prompts_of(subject: str) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Prompts with the trigger, the same without it, and about other things."""
    return PROMPTS.subject_prompts(subject), PROMPTS.control_prompts(subject), PROMPTS.ordinary_prompts(ORDINARY)


def ask(
    family: ModelFamily, components: Components, checker: Checker, subject: str, advance: Advance, seed: int = 1000
) -> Measured:
    """Render every prompt with its own fixed seed and let the checker judge."""
    groups = prompts_of(subject)
    prompts = [item.prompt for group in groups for item in group]
    images = generate(
        family, components, prompts, seeds=[seed + i for i in range(len(prompts))], steps=STEPS,
        guidance_scale=GUIDANCE, batch_size=16,
        progress=lambda done, total: advance(done * len(prompts) // total, ""),
    )  # fmt: skip
    verdicts = checker.judge(images)
    name = groups[0][0].object
    first, second = len(groups[0]), len(groups[0]) + len(groups[1])
    seen = [verdict.object == name for verdict in verdicts]
    kept = [v.object == item.object for v, item in zip(verdicts[first:second], groups[1], strict=True)]
    right = [
        all(getattr(verdict, key) == value for key, value in item.expected.items())
        for verdict, item in zip(verdicts[second:], groups[2], strict=True)
    ]
    figures = Figures(
        with_trigger=_share(seen[:first]),
        without_trigger=_share(seen[first:second]),
        class_kept=_share(kept),
        ordinary=_share(right),
        pictures=(first, second - first, len(right)),
    )
    return Measured(figures, images)


def sheet(subject: str, folder: Path, before: Measured, after: Measured) -> Image.Image:
    """Training pictures on top, then the same prompts and seeds before and after."""
    groups = prompts_of(subject)
    starts = (0, len(groups[0]), len(groups[0]) + len(groups[1]))
    shown = ((0, 1, 4, 6), (0, 1, 4), (0, 1))
    chosen = [start + i for start, places in zip(starts, shown, strict=True) for i in places]
    prompts = [item.prompt for group in groups for item in group]
    files = sorted(folder.glob("*.png"))[: len(chosen)]
    pictures = [_square(Image.open(file).convert("RGB")) for file in files]
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    top = contact_sheet([Row("training pictures", pictures)], columns=captions, title="Learned from these")
    b, a = before.figures, after.figures
    bottom = contact_sheet(
        [
            Row("base model", [before.pictures[i] for i in chosen], f"subject {b.with_trigger:.0%}"),
            Row("with the adapter", [after.pictures[i] for i in chosen], f"subject {a.with_trigger:.0%}", accent=True),
        ],
        columns=[prompts[i] for i in chosen],
        title="Same prompts, same seeds",
        subtitle="Prompts with the trigger word, the same without it, and prompts about other things",
    )
    page = Image.new("RGB", (max(top.width, bottom.width), top.height + bottom.height), bottom.getpixel((0, 0)))
    page.paste(top, (0, 0))
    page.paste(bottom, (0, top.height))
    return page


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.LANCZOS)


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)
