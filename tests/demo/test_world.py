"""The drawn world: the same picture every time, captions that tell the truth, subjects that stand out."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.demo.world import (
    COLOURS,
    OBJECTS,
    PROMPTS,
    RARE_WORDS,
    SUBJECTS,
    Scene,
    caption,
    draw,
    draw_array,
    draw_subject,
    random_scene,
    write_style_pictures,
    write_subject_pictures,
)


def test_world_is_cheap_to_import():
    """Tests and tools that only need pictures must not pay for torch."""
    code = "import sys, finetune.demo.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_every_object_shows_its_colour_on_its_background(name):
    """An object that is not drawn, or drawn in the ground's colour, would teach nonsense."""
    picture = np.asarray(draw(Scene(name, "red", "cyan"))).reshape(-1, 3).astype(int)
    share = {c: float((np.abs(picture - np.array(COLOURS[c])).max(1) < 8).mean()) for c in ("red", "cyan")}
    assert share["red"] > 0.06
    assert share["cyan"] > 0.3


def test_objects_differ_from_each_other():
    """Two classes with one silhouette could not be told apart by anybody."""
    pictures = [draw_array(Scene(name, "black", "white")).astype(int) for name in OBJECTS]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            assert np.abs(first - second).mean() > 8


def test_scenes_follow_from_their_generator():
    """Captions are re-made from (seed, index) during training, so a scene must never depend on anything else."""
    for index in range(20):
        first = random_scene(np.random.default_rng((1, index)), mixed=0.5)
        second = random_scene(np.random.default_rng((1, index)), mixed=0.5)
        assert first == second
        assert np.array_equal(draw_array(first), draw_array(second))


def test_captions_name_only_what_is_there():
    """A caption that lies teaches the model to ignore captions."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        scene = random_scene(rng, plain=0.2, mixed=0.3)
        words = set(caption(scene, rng).replace(",", " ").split())
        shown = {scene.object, scene.colour, scene.background, *(scene.second or ())}
        assert words & set(OBJECTS) <= shown
        assert words & set(COLOURS) <= shown
        assert scene.object in words
        assert not words & set(RARE_WORDS)


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_subjects_look_unlike_their_class(name):
    """If the base could already draw the subject, teaching it would prove nothing."""
    subject = np.asarray(draw_subject(name, 0, background="white", size="large", position="center")).astype(int)
    for colour in COLOURS:
        if colour != "white":
            assert np.abs(subject - draw_array(Scene(name, colour, "white"))).mean() > 15


def test_subject_folder_has_pictures_captions_and_several_shapes(tmp_path):
    """Bucketing needs something to sort, and every picture needs its caption."""
    write_subject_pictures(tmp_path, count=10, seed=0)
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 10
    assert len({Image.open(file).size for file in pictures}) >= 3
    for file in pictures:
        assert "sks robot" in file.with_suffix(".txt").read_text()
    again = tmp_path / "again"
    write_subject_pictures(again, count=10, seed=0)
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in pictures)


def test_style_folder_has_captions_with_the_trigger(tmp_path):
    write_style_pictures(tmp_path, count=4)
    assert all("zwx style" in file.read_text() for file in tmp_path.glob("*.txt"))
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_control_prompts_are_the_subject_prompts_without_the_trigger():
    """The control is what separates "learned the word" from "overwrote the class"."""
    subject, control = PROMPTS.subject_prompts(), PROMPTS.control_prompts()
    assert len(subject) == len(control) >= 16
    for first, second in zip(subject, control, strict=True):
        assert first.prompt.replace("sks ", "") == second.prompt
        assert first.expected["object"] == "sks robot"
        assert second.expected["object"] == "robot"


def test_ordinary_prompts_cover_every_object():
    prompts = PROMPTS.ordinary_prompts(48)
    assert {p.object for p in prompts} == set(OBJECTS)
    assert all(p.colour != p.background for p in prompts)
