"""Ways to teach, side by side: the figures that docs/experiments.md shows can be made again by anybody."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from finetune.demo import compare, questions
from finetune.demo.questions import LESSONS
from finetune.run_files import load_run
from finetune.tracking import Reporter

SHORT = [
    "train.steps=2", "optimizer.warmup_steps=0", "data.prior.images=4", "data.prior.inference_steps=2",
    "validation.every=0",
]  # fmt: skip


@pytest.fixture()
def few_questions(monkeypatch):
    """Two prompts of a kind instead of sixty."""
    short = {name: replace(lesson, called=lesson.called[:24:8], uncalled=lesson.uncalled[:24:8])
             for name, lesson in LESSONS.items()}  # fmt: skip
    monkeypatch.setattr(questions, "ORDINARY", 2)
    monkeypatch.setattr(questions, "SHOWN", ((0, 1), (0,), (0,)))
    monkeypatch.setattr(compare, "LESSONS", short)


def test_a_way_leaves_figures_and_a_sheet_and_is_not_run_twice(few_questions, tmp_path):
    """A table of experiments is only worth something if one command makes it again."""
    found = compare.run_way("style", tmp_path, SHORT, Reporter())
    assert json.loads((tmp_path / "style.json").read_text()) == found
    assert found["after"]["pictures"] == [3, 3, 2]
    assert Image.open(tmp_path / "style.png").width > 400
    written = (tmp_path / "style.png").stat().st_mtime_ns
    assert compare.run_way("style", tmp_path, SHORT, Reporter()) == found
    assert (tmp_path / "style.png").stat().st_mtime_ns == written
    assert [text for text, _ in compare.rows_of(found)][:2] == list(compare.QUESTIONS.values())[:2]


@pytest.mark.parametrize("name", sorted(compare.WAYS))
def test_every_way_is_a_recipe_that_can_run(name):
    """A renamed field or recipe must not wait for somebody to compare."""
    way = compare.WAYS[name]
    assert load_run(way.recipe, values=way.changes)
    assert way.lesson in LESSONS


def test_an_unknown_way_is_refused_with_the_known_ones(monkeypatch, capsys):
    """A typing error must not start an hour of training."""
    monkeypatch.setattr("sys.argv", ["compare", "dreamboth"])
    with pytest.raises(SystemExit):
        compare.main()
    message = capsys.readouterr().err
    assert "dreamboth" in message
    assert "dreambooth-without-prior" in message
