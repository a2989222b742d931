"""The demo world: little pictures drawn by code, and the captions that describe them.

Everything is a pure function of a `Scene` or of a numpy generator, so any picture can be drawn again. The base model
in `finetune/demo/base` was trained on these pictures; the subjects and the neon style were kept from its UNet, so that
they can be taught. NumPy and Pillow only: this file is cheap to import.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from finetune.demo import shapes
from finetune.demo.shapes import OBJECTS, RGB, Array

RESOLUTION = 64
COLOURS: dict[str, RGB] = {
    "red": (215, 35, 35),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 60),
    "green": (35, 150, 65),
    "cyan": (70, 210, 225),
    "blue": (35, 75, 210),
    "purple": (125, 45, 165),
    "pink": (250, 155, 200),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
# Half the extent of an object in pixels of a 64 pixel picture.
SIZES = {"small": 10.0, "medium": 16.0, "large": 23.0}
POSITIONS = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
PLACES = {
    "center": ("in the middle", "in the center"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
TEXTURES = ("plain", "striped", "dotted")
STYLES = ("flat", "outline")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
LAYOUTS = ("alone", "side by side", "stacked")
RARE_WORDS = ("sks", "ohwx", "zwx", "mxv")


@dataclass(frozen=True)
class Scene:
    """One picture. Names come from the tables above; `shift` and `stretch` are the free play around them."""

    object: str
    colour: str
    background: str
    size: str = "large"
    position: str = "center"
    texture: str = "plain"
    style: str = "flat"
    shift: tuple[float, float] = (0.0, 0.0)
    """Pixels of a 64 pixel picture to the right and downwards."""
    stretch: float = 1.0
    """Factor on the size."""
    angle: float = 0.0
    """Turn in radians."""
    relation: str | None = None
    """Where the object lies as seen from `second`; None means a single object."""
    second: tuple[str, str] | None = None
    """Object and colour of the other thing."""
    colours: dict[str, RGB] = field(default_factory=dict)
    """Role -> RGB in 0..255, replacing the colours that follow from the names (random palettes)."""


def labels(scene: Scene) -> dict[str, str]:
    """What a picture shows, attribute -> name, under the names that `finetune.demo.checker` answers with."""
    if not scene.second or not scene.relation:
        names = ("object", "colour", "background", "size", "position", "style", "texture")
        return {**{name: getattr(scene, name) for name in names}, "layout": "alone"}
    things = [(scene.object, scene.colour), scene.second]
    if scene.relation in ("right of", "below"):
        things.reverse()
    (first, first_colour), (second, second_colour) = things
    layout = "side by side" if RELATIONS[scene.relation][0] else "stacked"
    return {"layout": layout, "first": first, "first_colour": first_colour, "second": second,
            "second_colour": second_colour, "background": scene.background}  # fmt: skip


def _mix(texture: str, colour: RGB, shade: RGB, u: Array, v: Array) -> Array:
    """The body's colour at every pixel; shape (H, W, 3)."""
    wave = np.sin(9.0 * (u + v)) if texture == "striped" else np.cos(8.0 * u) + np.cos(8.0 * v) - 0.9
    share = np.clip(wave * 2.0 + 0.5, 0, 1)[..., None]
    return np.asarray(colour, np.float32) * (1 - share) + np.asarray(shade, np.float32) * share


def draw_parts(
    canvas: Array, parts: list[shapes.Part], colours: dict[str, RGB], radius: float, style: str = "flat"
) -> None:
    """Paint an object's parts in order onto a float canvas (H, W, 3), in place."""
    for distance, role in parts:
        if style == "flat":
            shapes.paint(canvas, distance, radius, colours[role])
        elif style == "outline":
            shapes.paint(canvas, np.abs(distance) - 0.7 / radius, radius, colours.get("line", colours[role]))
        else:
            glow = np.exp(-np.abs(distance) * radius / 2.2)[..., None]
            core = np.exp(-((distance * radius) ** 2) / 1.2)[..., None]
            light = glow * 0.75 * np.asarray(colours[role], np.float32) + core * 110.0
            np.maximum(canvas, np.minimum(canvas + light, 255.0), out=canvas)


def place(scene: Scene, height: int, width: int) -> tuple[float, float, float]:
    """Centre x, centre y and radius of the scene's first object, in pixels of a (height, width) picture."""
    scale = min(height, width) / RESOLUTION
    radius = (13.5 if scene.second else SIZES[scene.size]) * scene.stretch * scale
    step_x, step_y = RELATIONS[scene.relation] if scene.relation else POSITIONS[scene.position]
    reach_x, reach_y = (0.95 * max(length / 2 - radius - scale, 0.0) for length in (width, height))
    x = width / 2 + step_x * reach_x + scene.shift[0] * scale
    return x, height / 2 + step_y * reach_y + scene.shift[1] * scale, radius


def _draw_object(
    canvas: Array, name: str, colours: dict[str, RGB], spot: tuple[float, float, float], scene: Scene
) -> None:
    x, y, radius = spot
    u, v = shapes.local_grid(canvas.shape[0], canvas.shape[1], x, y, radius, scene.angle)
    parts = OBJECTS[name](u, v)
    if scene.style == "outline":
        colours = {**colours, "line": colours["body"]}
    draw_parts(canvas, parts, colours, radius, scene.style)
    if scene.texture != "plain" and scene.style == "flat":
        body = next(distance for distance, role in parts if role == "body")
        shapes.paint(canvas, body, radius, _mix(scene.texture, colours["body"], colours["shade"], u, v))
        later = parts[next(i for i, part in enumerate(parts) if part[1] == "body") + 1 :]
        draw_parts(canvas, later, colours, radius)


def draw_array(scene: Scene, height: int = RESOLUTION, width: int = RESOLUTION) -> Array:
    """The scene as uint8 RGB; shape (height, width, 3)."""
    ground = scene.colours.get("background", COLOURS[scene.background])
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = ground
    x, y, radius = place(scene, height, width)
    if scene.second:
        other, colour = scene.second
        spot = (width - x, height - y, radius)
        _draw_object(canvas, other, shapes.palette(COLOURS[colour]), spot, replace(scene, texture="plain"))
    colours = {**shapes.palette(COLOURS[scene.colour]), **scene.colours}
    if scene.style == "neon":
        canvas[:] = (10, 10, 24)
    _draw_object(canvas, scene.object, colours, (x, y, radius), scene)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def draw(scene: Scene, height: int = RESOLUTION, width: int = RESOLUTION) -> Image.Image:
    """The scene as an RGB picture of `width` x `height` pixels."""
    return Image.fromarray(draw_array(scene, height, width))


def _pick(rng: np.random.Generator, names: tuple[str, ...] | list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def random_scene(
    rng: np.random.Generator, plain: float = 0.6, mixed: float = 0.0, small: float = 0.3, pairs: float = 0.5
) -> Scene:
    """A scene with an object of one colour on a background of another.

    Args:
        rng: the source of every choice.
        plain: share of scenes with a large object in the middle; the others have any size and position.
        mixed: share of scenes with something more: two objects, a texture or outlines.
        small: share of small objects among those of any size; four parts of the rest are medium, three large.
        pairs: share of scenes with two objects among the `mixed` ones, in quarters.
    """
    colour, background = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
    scene = Scene(_pick(rng, list(OBJECTS)), colour, background)
    if rng.random() >= plain:
        size = tuple(SIZES)[int(rng.choice(3, p=(small, (1 - small) * 4 / 7, (1 - small) * 3 / 7)))]
        scene = replace(scene, size=size, position=_pick(rng, list(POSITIONS)))
    if rng.random() < mixed:
        kind = int(rng.integers(4))
        if kind < 4 * pairs:
            third = _pick(rng, [name for name in COLOURS if name not in (colour, background)])
            others = [name for name in OBJECTS if name != scene.object]
            second = (_pick(rng, others), third)
            scene = replace(scene, relation=_pick(rng, list(RELATIONS)), second=second, size="medium")
        elif kind == 2:
            scene = replace(scene, texture=_pick(rng, list(TEXTURES[1:])))
        else:
            scene = replace(scene, style="outline")
    dx, dy, stretch, angle = rng.uniform(-1, 1, size=4)
    play = 1.6 if scene.size == "large" else 2.0
    return replace(
        scene,
        shift=(play * float(dx), play * float(dy)),
        stretch=1 + 0.06 * float(stretch),
        angle=0.09 * float(angle),
    )


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say what the picture shows, leaving out some attributes at random so that short prompts work too."""
    noun = [scene.object]
    if rng.random() < 0.92:
        noun.insert(0, scene.colour)
    if scene.texture != "plain":
        noun.insert(0, scene.texture)
    if scene.second is None and rng.random() < 0.4:
        noun.insert(0, scene.size)
    text = article(" ".join(noun))
    if scene.style == "outline":
        text = "an outline drawing of " + text
    if scene.second and scene.relation:
        text += f" {scene.relation} {article(' '.join(reversed(scene.second)))}"
    elif rng.random() < (0.7 if scene.position != "center" else 0.3):
        text += " " + _pick(rng, PLACES[scene.position])
    if rng.random() < 0.88:
        text += f" on {article(scene.background)} background"
    return text
