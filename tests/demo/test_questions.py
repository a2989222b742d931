"""Whether something was learned: the questions must be fair, the same before and after, and about what was drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetune.demo import questions
from finetune.demo.checker import load_checker
from finetune.demo.pictures_folder import PICTURES, draw
from finetune.demo.questions import LESSONS
from finetune.families import load_family


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_a_lesson_shows_what_its_questions_ask_for(name, tmp_path):
    """Taught from pictures that the checker would not recognise, every way would score nothing."""
    lesson = LESSONS[name]
    draw(tmp_path, name)
    files = sorted(tmp_path.glob("*.png"))
    seen = [lesson.seen(verdict) for verdict in load_checker().judge([Image.open(file) for file in files])]
    assert len(seen) == PICTURES[name]
    # keep: two of a subject's pictures are wider or taller than the squares that the checker knows.
    assert sum(seen) >= len(seen) - 3
    assert all(lesson.word in file.with_suffix(".txt").read_text() for file in files)


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_the_control_is_the_same_without_the_word(name):
    """What appears without the word was not learned under it."""
    lesson = LESSONS[name]
    assert len(lesson.called) == len(lesson.uncalled) >= 60
    assert all(lesson.word in item.prompt for item in lesson.called)
    assert not any(lesson.word in item.prompt for item in lesson.uncalled)


def test_half_of_the_questions_still_has_every_wording():
    """"large" before the trigger fails where "on the left" does not: a quick answer must ask for both."""
    wordings = {item.prompt.replace(item.background, "").replace(" an ", " a ") for item in LESSONS["robot"].called}
    half = LESSONS["robot"].halved()
    kept = {item.prompt.replace(item.background, "").replace(" an ", " a ") for item in half.called}
    assert 2 * len(half.called) == len(LESSONS["robot"].called)
    assert {w for w in wordings if "large" not in w} <= kept
    assert any("large" in w and ("on the" in w or "at the" in w) for w in kept)


def test_seeds_are_asked_side_by_side_and_leave_each_other_alone(monkeypatch):
    """Choosing by some seeds and reporting others is only honest if they share neither noise nor other prompts."""
    monkeypatch.setattr(questions, "STEPS", 2)
    robot = LESSONS["robot"]
    lesson = replace(robot, called=robot.called[:2], uncalled=robot.uncalled[:2], others=2)
    family, components = load_family("demo")
    one, both, other = (
        questions.ask(family, components, load_checker(), lesson, lambda *_: None, seeds)
        for seeds in ((0,), (0, 1), (1,))
    )
    assert both.figures.pictures == (4, 4, 4)
    assert _distance(one.shown, both.shown) < 0.5, "the batch they are drawn in must not matter"
    assert _distance(one.shown, other.shown) > 5
    assert lesson.groups(0)[2] != lesson.groups(1)[2]


def _distance(some: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean difference in grey levels."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]))
