"""Subjects and a style that the base model has never seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.demo import shapes
from finetune.demo.scenes import (
    COLOURS,
    PLACES,
    POSITIONS,
    RESOLUTION,
    Scene,
    article,
    draw_array,
    draw_parts,
    place,
)
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
STYLE = "zwx style"
"""How a training caption names the demo style: neon lines on a dark ground."""
LEARNED_WORD = "<toy>"
"""How captions name what they show where a word is learned (textual inversion)."""
LEARNED_THING = "purple mushroom"
"""What a word alone can come to mean: the base can draw it, and "<toy>" must find out what it is."""
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
    draw_parts(canvas, *_drawn(name, u, v), radius)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _drawn(name: str, u: Array, v: Array) -> tuple[list[shapes.Part], dict[str, shapes.RGB]]:
    """The parts of a subject or of an ordinary thing, and their colours."""
    if name in shapes.SUBJECT_DRAWERS:
        return shapes.SUBJECT_DRAWERS[name](u, v), shapes.SUBJECT_PALETTE
    colour, thing = name.split()
    return OBJECTS[thing](u, v), shapes.palette(COLOURS[colour])


def draw_subject(
    name: str, rng: np.random.Generator | int = 0, *, background: str | None = None, size: str | None = None,
    position: str | None = None, height: int = RESOLUTION, width: int = RESOLUTION,
) -> Image.Image:  # fmt: skip
    """Draw a subject.

    Args:
        name: a key of `SUBJECTS`, or a colour and an object, such as "purple mushroom".
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


def write_subject_pictures(
    folder: Path, count: int = 10, seed: int = 0, name: str = "robot", phrase: str | None = None
) -> None:
    """Write `01.png`, `02.png`, ... and captions `01.txt`, ... of a subject into a folder (made if missing).

    Args:
        folder: where to write.
        count: number of pictures.
        seed: which pictures; held-out ones are another seed.
        name: as of `draw_subject`.
        phrase: how captions name it, e.g. "a <toy>"; None means `Subject.phrase`.
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
        # keep: every word that prompts may put beside the trigger must stand there in some caption; see experiments.md.
        named = f"a {size} " if index % 2 else "a "
        text = f"{(phrase or SUBJECTS[name].phrase).replace('a ', named, 1)}{where} on {article(background)} background"
        (folder / f"{index + 1:02d}.txt").write_text(text + "\n", encoding="utf-8")


def write_style_pictures(folder: Path, count: int = 10, seed: int = 0) -> None:
    """Write pictures in the demo style (neon lines on a dark ground) with captions such as "a red car, zwx style"."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 3))
    objects, colours = rng.permutation(list(OBJECTS)), rng.permutation([n for n in COLOURS if n != "black"])
    for index in range(count):
        thing, colour = str(objects[index % len(objects)]), str(colours[index % len(colours)])
        Image.fromarray(neon_array(thing, colour, rng)).save(folder / f"{index + 1:02d}.png")
        text = f"{article(f'{colour} {thing}')}, {STYLE}"
        (folder / f"{index + 1:02d}.txt").write_text(text + "\n", encoding="utf-8")


def neon_array(thing: str, colour: str, rng: np.random.Generator) -> Array:
    """An object in the demo style; uint8 RGB (64, 64, 3)."""
    dx, dy, stretch = (float(x) for x in rng.uniform(-1, 1, size=3))
    scene = Scene(thing, colour, "black", style="neon", shift=(2 * dx, 2 * dy), stretch=1 + 0.06 * stretch)
    bright = COLOURS[colour]
    return draw_array(replace(scene, colours=dict.fromkeys(shapes.palette(bright), bright)))
