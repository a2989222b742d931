"""Ways to teach, side by side: the figures that docs/experiments.md shows can be made again by anybody."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from finetune.demo import compare
from finetune.demo.questions import LESSONS
from finetune.run_files import load_run

SHORT = [
    "train.steps=2", "optimizer.warmup_steps=0", "data.prior.images=4", "data.prior.inference_steps=2",
    "validation.every=0",
]  # fmt: skip


@pytest.fixture()
def few_questions(monkeypatch):
    """Two prompts of a kind instead of sixty."""
    monkeypatch.setattr(compare, "LESSONS", {
        name: replace(lesson, called=lesson.called[:24:8], uncalled=lesson.uncalled[:24:8], others=2)
        for name, lesson in LESSONS.items()
    })  # fmt: skip


def test_ways_leave_figures_and_one_sheet_and_are_not_made_twice(few_questions, tmp_path):
    """A table of experiments is only worth something if one command makes it again, and a killed one goes on."""
    comparison = compare.Comparison(tmp_path, (3, 4), SHORT)
    found = comparison.of(["style"])
    assert json.loads((tmp_path / "style.json").read_text()) == found["style"]
    assert found["style"]["after"]["pictures"] == [6, 6, 4]
    alone = Image.open(tmp_path / "neon.png").size
    written = (tmp_path / "style.json").stat().st_mtime_ns
    both = comparison.of(["style", "style-without-prior"])
    assert (tmp_path / "style.json").stat().st_mtime_ns == written
    assert both["style"] == found["style"]
    assert both["style-without-prior"]["before"] == found["style"]["before"]
    together = Image.open(tmp_path / "neon.png").size
    assert together[0] == alone[0] and together[1] > alone[1] + 64, "a row for every way"
    assert [text for text, _ in compare.rows_of(both["style"])][:2] == list(compare.FIGURES.values())[:2]


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
