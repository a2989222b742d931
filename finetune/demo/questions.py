"""Was it learned, and what else changed? Pictures are rendered and judged by the checker.

Four questions, because one alone can be fooled: is the subject or style there when its trigger is in the prompt; does
it stay away when the trigger is not (else the class was overwritten and the word means nothing); does the class stay
what it was; and do prompts that have nothing to do with it still give what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.demo import prompts as asked
from finetune.demo.checker import Checker, Verdict
from finetune.demo.prompts import Prompt
from finetune.demo.subjects import LEARNED_WORD, SUBJECTS
from finetune.families.base import Components, ModelFamily
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet
from finetune.tracking import Advance

STEPS = 20
GUIDANCE = 5.0
ORDINARY = 60
"""How many prompts about other things are asked."""
SHOWN = ((0, 1, 13, 22), (0, 1, 13), (0, 1))
"""Which prompts of the three groups a sheet shows."""


@dataclass(frozen=True)
class Lesson:
    """Something to teach, and the prompts that tell whether it was learned.

    Attributes:
        word: what calls it, for tables.
        attribute: what the checker is asked, e.g. "object".
        answer: what it says when it sees what was taught, e.g. "sks robot".
        kind: what prompts without the word are about, for tables.
        called: prompts with the word.
        uncalled: the same prompts without it.
    """

    word: str
    attribute: str
    answer: str
    kind: str
    called: Sequence[Prompt]
    uncalled: Sequence[Prompt]

    @property
    def ordinary(self) -> list[Prompt]:
        """Prompts about other things."""
        return asked.ordinary_prompts(ORDINARY)

    @property
    def groups(self) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
        """All three kinds of prompts."""
        return self.called, self.uncalled, self.ordinary

    def seen(self, verdict: Verdict) -> bool:
        """Whether a picture shows what was taught."""
        return bool(getattr(verdict, self.attribute) == self.answer)

    @classmethod
    def of_subject(cls, name: str, word: str | None = None) -> Lesson:
        """One of the demo subjects, called by its trigger and class, or by a word of its own."""
        subject = SUBJECTS[name]
        answer = f"{subject.trigger} {subject.class_word}"
        called = [replace(p, prompt=p.prompt.replace(answer, word or answer)) for p in asked.subject_prompts(name)]
        kind = f"ordinary {subject.class_word}"
        return cls(word or subject.trigger, "object", answer, kind, called, asked.control_prompts(name))


LESSONS: dict[str, Lesson] = {
    **{name: Lesson.of_subject(name) for name in SUBJECTS},
    "robot-word": Lesson.of_subject("robot", LEARNED_WORD),
    "neon": Lesson("zwx", "style", "neon", "flat picture", asked.style_prompts(), asked.plain_style_prompts()),
}
"""What the demo recipes teach, by name."""


@dataclass(frozen=True)
class Figures:
    """Shares of pictures, 0 to 1.

    Attributes:
        with_trigger: show what was taught when asked for it.
        without_trigger: show it when asked for the same without the word.
        class_kept: show an ordinary member of the class (for a style: the object, flat) when asked for one.
        ordinary: show the object, the colour and the background that a prompt about other things names.
        called_right: with the word, show everything else that the prompt names too.
        pictures: how many were judged for each of the three groups of prompts.
    """

    with_trigger: float
    without_trigger: float
    class_kept: float
    ordinary: float
    called_right: float
    pictures: tuple[int, int, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "pictures": list(self.pictures)}


@dataclass(frozen=True)
class Measured:
    """Figures and the pictures they were read from, in the order of `Lesson.groups`."""

    figures: Figures
    pictures: list[Image.Image]


def ask(
    family: ModelFamily, components: Components, checker: Checker, lesson: Lesson, advance: Advance, seed: int = 1000
) -> Measured:
    """Render every prompt with its own fixed seed and let the checker judge."""
    prompts = [item.prompt for group in lesson.groups for item in group]
    images = generate(
        family, components, prompts, seeds=[seed + i for i in range(len(prompts))], steps=STEPS,
        guidance_scale=GUIDANCE, batch_size=24,
        progress=lambda done, total: advance(done * len(prompts) // total, ""),
    )  # fmt: skip
    verdicts = iter(checker.judge(images))
    called, uncalled, ordinary = ([(next(verdicts), item) for item in group] for group in lesson.groups)
    return Measured(
        Figures(
            with_trigger=_share([lesson.seen(verdict) for verdict, _ in called]),
            without_trigger=_share([lesson.seen(verdict) for verdict, _ in uncalled]),
            class_kept=_share([
                _shows(verdict, {"object": item.expected["object"]}) and not lesson.seen(verdict)
                for verdict, item in uncalled
            ]),
            ordinary=_share([_shows(verdict, item.expected) for verdict, item in ordinary]),
            called_right=_share([_shows(verdict, item.expected) for verdict, item in called]),
            pictures=(len(called), len(uncalled), len(ordinary)),
        ),
        images,
    )  # fmt: skip


def _shows(verdict: Verdict, expected: dict[str, str]) -> bool:
    return all(getattr(verdict, name) == value for name, value in expected.items())


def sheet(lesson: Lesson, folder: Path, rows: Sequence[tuple[str, Measured]]) -> Image.Image:
    """Training pictures on top, then the same prompts and seeds before and after.

    Args:
        lesson: what was taught.
        folder: the training pictures, with captions beside them.
        rows: label and pictures of every model, the base first.
    """
    starts = (0, len(lesson.called), len(lesson.called) + len(lesson.uncalled))
    chosen = [start + i for start, places in zip(starts, SHOWN, strict=True) for i in places]
    prompts = [item.prompt for group in lesson.groups for item in group]
    files = sorted(folder.glob("*.png"))[: len(chosen)]
    pictures = [_square(Image.open(file).convert("RGB")) for file in files]
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    top = contact_sheet([Row("training pictures", pictures)], columns=captions, title="Learned from these")
    bottom = contact_sheet(
        [
            Row(label, [measured.pictures[i] for i in chosen],
                f"{lesson.answer} {measured.figures.with_trigger:.0%}", accent=index > 0)
            for index, (label, measured) in enumerate(rows)
        ],
        columns=[prompts[i] for i in chosen],
        title="Same prompts, same seeds",
        subtitle="Prompts with the trigger word, the same without it, and prompts about other things",
    )  # fmt: skip
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
