"""Was it learned, and what else changed? Pictures are rendered and judged by the checker.

Four questions, because one alone can be fooled: is the subject or style there when its trigger is in the prompt; does
it stay away when the trigger is not (else the class was overwritten and the word means nothing); does the class stay
what it was; and do prompts that have nothing to do with it still give what they say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.demo import prompts as asked
from finetune.demo.checker import Checker, Verdict
from finetune.demo.prompts import Prompt
from finetune.demo.subjects import LEARNED_THING, LEARNED_WORD, SUBJECTS
from finetune.families.base import Components, ModelFamily
from finetune.sampling.generate import generate
from finetune.sampling.grid import Row, contact_sheet
from finetune.tracking import Advance

STEPS = 12
GUIDANCE = 5.0
BATCH = 24
SHOWN = ((0, 9, 42, 51), (0, 9, 42), (0, 1))
"""Which prompts of the three kinds a sheet shows: of 64 of the first two kinds, or the same part of fewer."""


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
        others: how many prompts about other things are asked.
    """

    word: str
    attribute: str
    answer: str
    kind: str
    called: Sequence[Prompt]
    uncalled: Sequence[Prompt]
    others: int = 60

    def groups(self, seed: int) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
        """All three kinds of prompts; those about other things follow from the seed."""
        return self.called, self.uncalled, asked.ordinary_prompts(self.others, seed)

    def halved(self) -> Lesson:
        """Every second prompt only, for a quick answer."""
        return replace(self, called=self.called[::2], uncalled=self.uncalled[::2], others=self.others // 2)

    def seen(self, verdict: Verdict) -> bool:
        """Whether a picture shows what was taught."""
        return bool(getattr(verdict, self.attribute) == self.answer)

    def shown(self) -> tuple[list[int], list[int], list[int]]:
        """Which prompts of each kind stand on a sheet."""
        called, uncalled, others = SHOWN
        part = len(self.called) / 64
        return [int(i * part) for i in called], [int(i * part) for i in uncalled], list(others)

    @classmethod
    def of_subject(cls, name: str, word: str | None = None) -> Lesson:
        """One of the demo subjects, called by its trigger and class, or by a word of its own."""
        subject = SUBJECTS[name]
        answer, kind = f"{subject.trigger} {subject.class_word}", f"ordinary {subject.class_word}"
        called = asked.subject_prompts(name, word)
        return cls(word or subject.trigger, "object", answer, kind, called, asked.control_prompts(name))

    @classmethod
    def of_word(cls, thing: str, start: str) -> Lesson:
        """A thing that the base can draw, such as "purple mushroom", under a new word that starts as another word."""
        colour, answer = thing.split()
        called = asked.placed_prompts(LEARNED_WORD, object=answer, colour=colour)
        return cls(LEARNED_WORD, "object", answer, start, called, asked.placed_prompts(start, object=start))


LESSONS: dict[str, Lesson] = {
    **{name: Lesson.of_subject(name) for name in SUBJECTS},
    "word": Lesson.of_word(LEARNED_THING, "ball"),
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
        pictures: how many were judged for each of the three kinds of prompts.
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
    """Figures, and the pictures of `Lesson.shown` under the first seed."""

    figures: Figures
    shown: list[Image.Image]


def ask(
    family: ModelFamily, components: Components, checker: Checker, lesson: Lesson, advance: Advance,
    seeds: Sequence[int] = (0,),
) -> Measured:  # fmt: skip
    """Render every prompt under every seed, and let the checker judge.

    Args:
        seeds: each means other noise and other prompts about other things. Choose settings by some, report by others.
    """
    kinds = _questions(lesson, seeds)
    questions = [question for kind in kinds for question in kind]
    images = generate(
        family, components, [item.prompt for item, _ in questions], seeds=[noise for _, noise in questions],
        steps=STEPS, guidance_scale=GUIDANCE, batch_size=BATCH,
        progress=lambda done, total: advance(done * len(questions) // total, ""),
    )  # fmt: skip
    verdicts = iter(checker.judge(images))
    called, uncalled, ordinary = ([(next(verdicts), item) for item, _ in kind] for kind in kinds)
    starts = (0, *itertools.accumulate(map(len, kinds)))
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
        [images[start + i] for start, places in zip(starts, lesson.shown(), strict=False) for i in places],
    )  # fmt: skip


def _questions(lesson: Lesson, seeds: Sequence[int]) -> list[list[tuple[Prompt, int]]]:
    """Per kind: every prompt under every seed, with the seed of its picture's noise."""
    kinds: list[list[tuple[Prompt, int]]] = [[], [], []]
    for seed in seeds:
        noise = itertools.count(1000 * (seed + 1))
        for kind, group in zip(kinds, lesson.groups(seed), strict=True):
            kind += [(item, next(noise)) for item in group]
    return kinds


def _shows(verdict: Verdict, expected: dict[str, str]) -> bool:
    return all(getattr(verdict, name) == value for name, value in expected.items())


def sheet(lesson: Lesson, folder: Path, rows: Sequence[tuple[str, Measured]], seed: int = 0) -> Image.Image:
    """Training pictures on top, then the same prompts and seeds before and after.

    Args:
        lesson: what was taught.
        folder: the training pictures, with captions beside them.
        rows: label and pictures of every model, the base first.
        seed: the first of those that were asked.
    """
    kinds = zip(lesson.groups(seed), lesson.shown(), strict=True)
    prompts = [group[i].prompt for group, places in kinds for i in places]
    files = sorted(folder.glob("*.png"))[: len(prompts)]
    pictures = [_square(Image.open(file).convert("RGB")) for file in files]
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    top = contact_sheet([Row("training pictures", pictures)], columns=captions, title="Learned from these")
    bottom = contact_sheet(
        [
            Row(label, measured.shown,
                f"{lesson.answer} {measured.figures.with_trigger:.0%}", accent=index > 0)
            for index, (label, measured) in enumerate(rows)
        ],
        columns=prompts,
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
