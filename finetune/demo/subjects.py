"""Subjects and a style that the base model has never seen, and the prompts that test whether they were learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.demo import shapes
from finetune.demo.scenes import COLOURS, PLACES, POSITIONS, RESOLUTION, SIZES, Scene, draw_array, draw_parts, place
from finetune.demo.shapes import OBJECTS, Array


@dataclass(frozen=True)
class Subject:
    """A thing of a known class with a look of its own: fixed silhouette details and fixed colours."""

    name: str
    class_word: str
    trigger: str = "sks"

    @property
    def phrase(self) -> str:
        """How a training caption names it."""
        return f"a {self.trigger} {self.class_word}"


SUBJECTS: dict[str, Subject] = {"robot": Subject("robot", "robot"), "fish": Subject("fish", "fish", "ohwx")}
# The subject's own body colours are left out: a lime robot on a green ground is a poor picture.
SUBJECT_BACKGROUNDS = tuple(name for name in COLOURS if name not in ("green", "purple"))


def subject_array(
    name: str, rng: np.random.Generator | int = 0, *, background: str | None = None, size: str | None = None,
    position: str | None = None, height: int = RESOLUTION, width: int = RESOLUTION,
) -> Array:  # fmt: skip
    """The subject as uint8 RGB, shape (height, width, 3); see `draw_subject`."""
    rng = np.random.default_rng((7, rng)) if isinstance(rng, int) else rng
    names = SUBJECT_BACKGROUNDS
    chosen = names[int(rng.integers(len(names)))]
    sizes, places = ("medium", "large", "large"), ("center", "center", *POSITIONS)
    chosen_size, chosen_place = sizes[int(rng.integers(3))], places[int(rng.integers(len(places)))]
    dx, dy, stretch, angle = (float(x) for x in rng.uniform(-1, 1, size=4))
    scene = Scene(name, "red", background or chosen, size or chosen_size, position or chosen_place,
                  shift=(1.6 * dx, 1.6 * dy), stretch=1 + 0.06 * stretch, angle=0.09 * angle)  # fmt: skip
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = COLOURS[scene.background]
    x, y, radius = place(scene, height, width)
    u, v = shapes.local_grid(height, width, x, y, radius, scene.angle)
    draw_parts(canvas, shapes.SUBJECT_DRAWERS[name](u, v), shapes.SUBJECT_PALETTE, radius)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def draw_subject(
    name: str, rng: np.random.Generator | int = 0, *, background: str | None = None, size: str | None = None,
    position: str | None = None, height: int = RESOLUTION, width: int = RESOLUTION,
) -> Image.Image:  # fmt: skip
    """Draw a subject.

    Args:
        name: a key of `SUBJECTS`.
        rng: source of what is not given; a number stands for "the picture with this index".
        background: a colour name; None picks one.
        size: a key of `SIZES`; None picks medium or large.
        position: a key of `POSITIONS`; None picks one.
        height: rows in pixels.
        width: columns in pixels.
    """
    return Image.fromarray(subject_array(name, rng, background=background, size=size, position=position, height=height,
                                         width=width))  # fmt: skip


# Pixels, (height, width): mostly square, a few not, so that aspect-ratio buckets have work to do.
PICTURE_SIZES = (
    (64, 64),
    (64, 64),
    (64, 64),
    (72, 96),
    (64, 64),
    (128, 128),
    (64, 64),
    (80, 64),
    (64, 64),
    (96, 96),
)


def write_subject_pictures(folder: Path, count: int = 10, seed: int = 0, name: str = "robot") -> None:
    """Write `01.png`, `02.png`, ... and captions `01.txt`, ... of a subject into a folder (made if missing).

    Args:
        folder: where to write.
        count: number of pictures.
        seed: which pictures; held-out ones are another seed.
        name: a key of `SUBJECTS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 1))
    order = rng.permutation(len(SUBJECT_BACKGROUNDS))
    for index in range(count):
        background = SUBJECT_BACKGROUNDS[int(order[index % len(order)])]
        size = ("large", "large", "medium")[index % 3]
        position = ("center", "left", "center", "right", "top", "center", "bottom")[index % 7]
        height, width = PICTURE_SIZES[index % len(PICTURE_SIZES)]
        rng = np.random.default_rng((seed, 2, index))
        picture = draw_subject(
            name, rng, background=background, size=size, position=position, height=height, width=width
        )
        picture.save(folder / f"{index + 1:02d}.png")
        where = "" if position == "center" else f" {PLACES[position][0]}"
        text = f"{SUBJECTS[name].phrase}{where} on a {background} background"
        (folder / f"{index + 1:02d}.txt").write_text(text + "\n", encoding="utf-8")


def write_style_pictures(folder: Path, count: int = 10, seed: int = 0) -> None:
    """Write pictures in the demo style (neon lines on a dark ground) with captions such as "a red car, zwx style"."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 3))
    objects, colours = rng.permutation(list(OBJECTS)), rng.permutation([n for n in COLOURS if n != "black"])
    for index in range(count):
        thing, colour = str(objects[index % len(objects)]), str(colours[index % len(colours)])
        Image.fromarray(neon_array(thing, colour, rng)).save(folder / f"{index + 1:02d}.png")
        text = f"a {colour} {thing}, zwx style".replace("a orange", "an orange")
        (folder / f"{index + 1:02d}.txt").write_text(text + "\n", encoding="utf-8")


def neon_array(thing: str, colour: str, rng: np.random.Generator) -> Array:
    """An object in the demo style; uint8 RGB (64, 64, 3)."""
    dx, dy, stretch = (float(x) for x in rng.uniform(-1, 1, size=3))
    scene = Scene(thing, colour, "black", style="neon", shift=(2 * dx, 2 * dy), stretch=1 + 0.06 * stretch)
    bright = COLOURS[colour]
    return draw_array(replace(scene, colours=dict.fromkeys(shapes.palette(bright), bright)))


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show; None means "anything goes"."""

    prompt: str
    object: str | None = None
    colour: str | None = None
    background: str | None = None
    size: str | None = None
    position: str | None = None

    @property
    def expected(self) -> dict[str, str]:
        """The attributes that were asked for."""
        names = ("object", "colour", "background", "size", "position")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class PROMPTS:
    """Evaluation prompts. A subject is expected as the checker names it: "sks robot", "ohwx fish"."""

    @staticmethod
    def subject_prompts(name: str = "robot") -> list[Prompt]:
        """The subject on every background and in some places, named by its trigger."""
        subject = SUBJECTS[name]
        thing = f"{subject.trigger} {subject.class_word}"
        wordings = ("a {t}{w} on a {b} background", "a large {t}{w} on a {b} background")
        places = ("", " on the left", " on the right", " at the top", " at the bottom")
        found = []
        for index, background in enumerate(SUBJECT_BACKGROUNDS):
            for turn, wording in enumerate(wordings):
                where = places[(index + 2 * turn) % len(places)]
                text = wording.format(t=thing, w=where, b=background).replace("a orange", "an orange")
                found.append(Prompt(text, object=thing, background=background))
        return [Prompt(f"a {thing}", object=thing), *found]

    @staticmethod
    def control_prompts(name: str = "robot") -> list[Prompt]:
        """The same prompts without the trigger: they must keep showing an ordinary member of the class."""
        subject = SUBJECTS[name]
        return [
            replace(item, prompt=item.prompt.replace(f"{subject.trigger} ", ""), object=subject.class_word)
            for item in PROMPTS.subject_prompts(name)
        ]

    @staticmethod
    def ordinary_prompts(count: int = 48, seed: int = 0) -> list[Prompt]:
        """Every object in turn, with a colour and a background, which teaching a subject must not change."""
        rng = np.random.default_rng((seed, 4))
        found = []
        for index in range(count):
            thing = list(OBJECTS)[index % len(OBJECTS)]
            colour, background = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
            text = f"a {colour} {thing} on a {background} background".replace("a orange", "an orange")
            found.append(Prompt(text, object=thing, colour=colour, background=background))
        return found

    @staticmethod
    def full_prompts(count: int = 240, seed: int = 0) -> list[Prompt]:
        """Every attribute named: "a small red robot on the left on a blue background"."""
        rng = np.random.default_rng((seed, 5))
        found = []
        for index in range(count):
            thing = list(OBJECTS)[index % len(OBJECTS)]
            colour, background = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
            size, position = list(SIZES)[int(rng.integers(3))], list(POSITIONS)[int(rng.integers(5))]
            where = PLACES[position][0]
            text = f"a {size} {colour} {thing} {where} on a {background} background".replace("a orange", "an orange")
            found.append(Prompt(text, thing, colour, background, size, position))
        return found
