"""The drawn world: the same picture every time, captions that tell the truth, subjects that stand out."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.demo import prompts
from finetune.demo.scenes import COLOURS, RARE_WORDS, RELATIONS, Scene, caption, draw, draw_array, labels, random_scene
from finetune.demo.shapes import OBJECTS
from finetune.demo.subjects import SUBJECTS, draw_subject, write_style_pictures, write_subject_pictures


def test_world_is_cheap_to_import():
    """Tests and tools that only need pictures must not pay for torch."""
    code = "import sys, finetune.demo.subjects; sys.exit('torch' in sys.modules)"
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
    subject, control = prompts.subject_prompts(), prompts.control_prompts()
    assert len(subject) == len(control) >= 60
    for first, second in zip(subject, control, strict=True):
        assert first.prompt.replace("sks ", "") == second.prompt
        assert first.expected["object"] == "sks robot"
        assert second.expected["object"] == "robot"


def test_ordinary_prompts_cover_every_object():
    asked = prompts.ordinary_prompts(48)
    assert {p.object for p in asked} == set(OBJECTS)
    assert all(p.colour != p.background for p in asked)


def test_pair_prompts_expect_what_the_relation_says():
    """ "Right of" and "below" turn the order round; a checker that read it wrongly would call chance a success."""
    for item in prompts.pair_prompts(24):
        words = r"an? \w+ (\w+) (left of|right of|above|below) an? \w+ (\w+) on"
        thing, relation, other = re.match(words, item.prompt).groups()
        first, second = (thing, other) if relation in ("left of", "above") else (other, thing)
        assert (item.first, item.second) == (first, second)
        assert item.layout == ("stacked" if relation in ("above", "below") else "side by side")


@pytest.mark.parametrize("relation", sorted(RELATIONS))
def test_labels_name_the_object_that_is_drawn_on_that_side(relation):
    """Labels train the checker: a red ball must really lie on the side that they say."""
    scene = Scene("ball", "red", "white", relation=relation, second=("box", "blue"))
    found, picture = labels(scene), draw_array(scene).astype(int)
    where = {
        name: np.argwhere(np.abs(picture - np.array(COLOURS[name])).max(2) < 8).mean(0) for name in ("red", "blue")
    }
    axis = 1 if found["layout"] == "side by side" else 0
    assert where[found["first_colour"]][axis] < where[found["second_colour"]][axis] - 20
    assert {found["first"], found["second"]} == {"ball", "box"}


def test_class_prompts_never_name_the_subject_and_differ_from_the_questions():
    """Prior preservation on the very prompts that judge it would be teaching to the test."""
    asked = {item.prompt for item in [*prompts.control_prompts(), *prompts.ordinary_prompts(60)]}
    captions = prompts.class_prompts("robot", own=48, others=48)
    assert not any(word in caption for caption in captions for word in RARE_WORDS)
    assert sum("robot" in caption for caption in captions) == 48
    assert len(asked & set(captions)) < 12
