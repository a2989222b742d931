"""Prompts that test the base and what it was taught, each with what its picture must show."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from finetune.demo.scenes import COLOURS, PLACES, POSITIONS, RELATIONS, SIZES, TEXTURES, Scene, article, labels
from finetune.demo.shapes import OBJECTS
from finetune.demo.subjects import STYLE, SUBJECT_BACKGROUNDS, SUBJECTS


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show, attribute by attribute as the checker names it; None: anything goes."""

    prompt: str
    object: str | None = None
    colour: str | None = None
    background: str | None = None
    size: str | None = None
    position: str | None = None
    style: str | None = None
    texture: str | None = None
    layout: str | None = None
    first: str | None = None
    first_colour: str | None = None
    second: str | None = None
    second_colour: str | None = None

    @property
    def expected(self) -> dict[str, str]:
        """The attributes that were asked for."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prompt"}
        return {name: value for name, value in found.items() if value is not None}


def _two_colours(rng: np.random.Generator) -> tuple[str, str]:
    first, second = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
    return first, second


def placed_prompts(words: str, **expected: str) -> list[Prompt]:
    """Something in eight wordings on each of the subjects' backgrounds: everywhere, and in two sizes.

    Args:
        words: what names it, e.g. "sks robot".
        expected: what its pictures must show besides the background, e.g. object="sks robot".
    """
    others = [PLACES[position][0] for position in POSITIONS if position != "center"]
    wordings = [("", ""), *(("", where) for where in others), ("large ", ""), ("medium ", ""), ("large ", "turns")]
    found = []
    for size, place in wordings:
        for index, background in enumerate(SUBJECT_BACKGROUNDS):
            where = others[index % len(others)] if place == "turns" else place
            text = f"a {size}{words} {where} on {article(background)} background".replace("  ", " ")
            found.append(Prompt(text, background=background, **expected))
    return found


def subject_prompts(name: str = "robot", word: str | None = None) -> list[Prompt]:
    """The subject, called by its trigger and class, or by a word of its own."""
    answer = f"{SUBJECTS[name].trigger} {SUBJECTS[name].class_word}"
    return placed_prompts(word or answer, object=answer)


def control_prompts(name: str = "robot") -> list[Prompt]:
    """The same prompts without the trigger: they must keep showing an ordinary member of the class."""
    return placed_prompts(SUBJECTS[name].class_word, object=SUBJECTS[name].class_word)


def style_prompts() -> list[Prompt]:
    """Every object in the demo style, in nine colours in turn."""
    colours = [name for name in COLOURS if name != "black"]
    things = [(thing, colours[(i + 4 * turn) % len(colours)]) for turn in range(5) for i, thing in enumerate(OBJECTS)]
    return [Prompt(f"{article(f'{colour} {thing}')}, {STYLE}", object=thing, style="neon") for thing, colour in things]


def plain_style_prompts() -> list[Prompt]:
    """The same prompts without the style: they must stay flat pictures of the same things."""
    return [replace(item, prompt=item.prompt.replace(f", {STYLE}", ""), style="flat") for item in style_prompts()]


def ordinary_prompts(count: int = 48, seed: int = 0) -> list[Prompt]:
    """Every object in turn, with a colour and a background."""
    rng = np.random.default_rng((seed, 4))
    found = []
    for index in range(count):
        thing = list(OBJECTS)[index % len(OBJECTS)]
        colour, background = _two_colours(rng)
        text = f"{article(f'{colour} {thing}')} on {article(background)} background"
        found.append(Prompt(text, object=thing, colour=colour, background=background))
    return found


def full_prompts(count: int = 240, seed: int = 0) -> list[Prompt]:
    """Every attribute named: "a small red robot on the left on a blue background"."""
    rng = np.random.default_rng((seed, 5))
    found = []
    for index in range(count):
        thing = list(OBJECTS)[index % len(OBJECTS)]
        colour, background = _two_colours(rng)
        size, position = list(SIZES)[int(rng.integers(3))], list(POSITIONS)[int(rng.integers(5))]
        where = PLACES[position][0]
        text = f"a {size} {colour} {thing} {where} on {article(background)} background"
        found.append(Prompt(text, thing, colour, background, size, position))
    return found


def pair_prompts(count: int = 240, seed: int = 0) -> list[Prompt]:
    """Two objects in each relation in turn: "a red ball left of a blue box on a white background"."""
    rng = np.random.default_rng((seed, 6))
    found = []
    for index in range(count):
        colour, background, other_colour = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:3])
        thing, other = (list(OBJECTS)[i] for i in rng.permutation(len(OBJECTS))[:2])
        relation = list(RELATIONS)[index % len(RELATIONS)]
        scene = Scene(thing, colour, background, relation=relation, second=(other, other_colour))
        text = f"{article(f'{colour} {thing}')} {relation} {article(f'{other_colour} {other}')}"
        found.append(Prompt(f"{text} on {article(background)} background", **labels(scene)))
    return found


def look_prompts(count: int = 240, seed: int = 0) -> list[Prompt]:
    """Textures and outlines in turn: "a striped red ball on ...", "an outline drawing of a red ball on ..."."""
    rng = np.random.default_rng((seed, 7))
    found = []
    for index in range(count):
        thing, look = list(OBJECTS)[index % len(OBJECTS)], (*TEXTURES[1:], "outline")[index // len(OBJECTS) % 3]
        colour, background = _two_colours(rng)
        ground = f"on {article(background)} background"
        common = Prompt("", object=thing, colour=colour, background=background)
        if look == "outline":
            text = f"an outline drawing of {article(f'{colour} {thing}')} {ground}"
            found.append(replace(common, prompt=text, style="outline"))
        else:
            found.append(replace(common, prompt=f"a {look} {colour} {thing} {ground}", texture=look, style="flat"))
    return found


def class_prompts(name: str, own: int, others: int, seed: int = 0) -> list[str]:
    """Captions for prior preservation, worded like those of the subject's pictures.

    Args:
        name: a key of `SUBJECTS`.
        own: captions about ordinary members of the subject's class, with and without a colour, anywhere.
        others: captions about everything else in turn.
        seed: another one than that of the prompts that judge.
    """
    rng = np.random.default_rng((seed, 8))
    word = SUBJECTS[name].class_word
    rest = [thing for thing in OBJECTS if thing != word]
    found = []
    for index in range(own + others):
        thing = word if index < own else rest[index % len(rest)]
        colour, background = _two_colours(rng)
        named = f"{colour} {thing}" if index >= own or index % 2 else thing
        where = PLACES[list(POSITIONS)[int(rng.integers(5))]][0] if index % 3 else ""
        size = f"{list(SIZES)[1 + int(rng.integers(2))]} " if index % 4 == 3 else ""
        found.append(f"{article(size + named)} {where} on {article(background)} background".replace("  ", " "))
    return found


def short_prompts(count: int, seed: int = 0) -> list[str]:
    """Captions with an object and a colour and nothing else, worded like those of the style pictures without the style.
    """
    rng = np.random.default_rng((seed, 9))
    colours, things = list(COLOURS), list(OBJECTS)
    return [article(f"{colours[int(rng.integers(len(colours)))]} {things[i % len(things)]}") for i in range(count)]
