"""Training pictures beyond the captioned world: what the autoencoder needs to draw subjects and styles it never saw."""

from __future__ import annotations

import numpy as np

from finetune.demo import shapes
from finetune.demo.scenes import COLOURS, RESOLUTION, Scene, draw_array, draw_parts, random_scene
from finetune.demo.shapes import OBJECTS, RGB, Array


def random_colour(rng: np.random.Generator) -> RGB:
    """Any RGB in 0..255; half of them vivid, because uniform draws are mostly muddy."""
    channels = rng.uniform(0, 255, size=3)
    if rng.random() < 0.5:
        order = rng.permutation(3)
        channels[order[0]] = rng.uniform(200, 255)
        channels[order[1]] = rng.uniform(0, 70)
    red, green, blue = (float(channel) for channel in channels)
    return red, green, blue


def _ground(rng: np.random.Generator, height: int, width: int) -> Array:
    """A background of one colour, a gradient or, rarely, soft noise; float (H, W, 3)."""
    canvas = np.empty((height, width, 3), np.float32)
    kind = rng.random()
    canvas[:] = random_colour(rng)
    if kind > 0.55:
        u, v = shapes.local_grid(height, width, width / 2, height / 2, 32.0, float(rng.uniform(0, 6.28)))
        share = np.clip(u * 0.5 + 0.5, 0, 1)[..., None] if kind < 0.85 else np.clip(np.hypot(u, v), 0, 1)[..., None]
        canvas += share * (np.asarray(random_colour(rng), np.float32) - canvas)
    if kind > 0.95:
        canvas += np.kron(rng.normal(0, 20, size=(height // 4, width // 4, 3)), np.ones((4, 4, 1))).astype(np.float32)
    return canvas


def _shape(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """Distance of a random primitive around the origin."""
    kind = int(rng.integers(5))
    a, b = (float(x) for x in rng.uniform(0.25, 1.0, size=2))
    if kind == 0:
        return shapes.circle(u, v, 0, 0, a)
    if kind == 1:
        return shapes.ellipse(u, v, 0, 0, a, b)
    if kind == 2:
        return shapes.box(u, v, 0, 0, a, b, float(rng.uniform(0, 0.25)))
    if kind == 3:
        return shapes.segment(u, v, (-a, -b), (a, b), float(rng.uniform(0.03, 0.15)))
    turns = np.sort(rng.uniform(0, 2 * np.pi, size=int(rng.integers(3, 7))))
    return shapes.polygon(u, v, [(float(np.cos(t)) * a, float(np.sin(t)) * b) for t in turns])


def collage(rng: np.random.Generator, height: int = RESOLUTION, width: int = RESOLUTION) -> Array:
    """Random shapes in random colours, filled, outlined or glowing; uint8 (H, W, 3)."""
    canvas = _ground(rng, height, width)
    style = ("flat", "flat", "outline", "neon")[int(rng.integers(4))]
    if style == "neon":
        canvas *= 0.2
    for _ in range(int(rng.integers(2, 11))):
        x, y = float(rng.uniform(4, width - 4)), float(rng.uniform(4, height - 4))
        radius = float(rng.uniform(3, 22))
        u, v = shapes.local_grid(height, width, x, y, radius, float(rng.uniform(0, 6.28)))
        colour = random_colour(rng)
        draw_parts(canvas, [(_shape(rng, u, v), "body")], {"body": colour}, radius, style)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def recoloured(rng: np.random.Generator) -> Array:
    """A world scene with free colours for every part and the background; uint8 (64, 64, 3)."""
    style = ("flat", "flat", "flat", "outline", "neon")[int(rng.integers(5))]
    base = random_scene(rng, plain=0.4, mixed=0.3)
    roles = ("body", "shade", "light", "ink", "wood", "cream", "background")
    colours = {role: random_colour(rng) for role in roles if role in ("body", "background") or rng.random() < 0.6}
    if rng.random() < 0.3:
        colours.pop("background")
    scene = Scene(base.object, base.colour, base.background, base.size, base.position, base.texture, style,
                  base.shift, base.stretch, base.angle, base.relation, base.second, colours)  # fmt: skip
    return draw_array(scene)


def creature(rng: np.random.Generator) -> Array:
    """A made-up thing: overlapping parts in vivid colours around one centre; uint8 (64, 64, 3)."""
    canvas = np.empty((RESOLUTION, RESOLUTION, 3), np.float32)
    names = list(COLOURS)
    canvas[:] = COLOURS[names[int(rng.integers(len(names)))]] if rng.random() < 0.7 else random_colour(rng)
    x, y, radius = (float(value) for value in rng.uniform((20, 20, 10), (44, 44, 26)))
    for turn in range(int(rng.integers(3, 11))):
        reach, where = (0.0 if turn == 0 else float(rng.uniform(0, 0.9))), float(rng.uniform(0, 6.28))
        size = radius * float(rng.uniform(0.12, 0.7) if turn else rng.uniform(0.5, 1.0))
        spot = (x + reach * radius * float(np.cos(where)), y + reach * radius * float(np.sin(where)))
        u, v = shapes.local_grid(RESOLUTION, RESOLUTION, *spot, size, float(rng.uniform(0, 6.28)))
        shapes.paint(canvas, _shape(rng, u, v), size, random_colour(rng))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def autoencoder_picture(rng: np.random.Generator) -> Array:
    """One training picture of the autoencoder: world, recoloured world, creature or collage; uint8 (64, 64, 3)."""
    kind = rng.random()
    if kind < 0.35:
        return draw_array(random_scene(rng, plain=0.5, mixed=0.15))
    if kind < 0.6:
        return recoloured(rng)
    return creature(rng) if kind < 0.85 else collage(rng)


def junk(rng: np.random.Generator) -> Array:
    """A picture with no nameable object, for the checker's "none": blobs, blends, noise; uint8 (64, 64, 3)."""
    kind = int(rng.integers(4))
    if kind == 0:
        return collage(rng)
    first = draw_array(random_scene(rng, plain=0.5)).astype(np.float32)
    if kind == 1:
        second = draw_array(random_scene(rng, plain=0.5)).astype(np.float32)
        share = rng.uniform(0.35, 0.65)
        return np.clip(first * share + second * (1 - share), 0, 255).astype(np.uint8)
    canvas = np.empty_like(first)
    names = list(COLOURS)
    canvas[:] = COLOURS[names[int(rng.integers(len(names)))]]
    colour = np.asarray(COLOURS[names[int(rng.integers(len(names)))]], np.float32)
    x, y, radius = (float(value) for value in rng.uniform((20, 20, 8), (44, 44, 24)))
    u, v = shapes.local_grid(RESOLUTION, RESOLUTION, x, y, radius)
    turn = np.arctan2(v, u)
    waves, phases = rng.normal(0, 0.16, size=5), rng.uniform(0, 6.28, size=5)
    edge = 0.8 + sum(waves[k] * np.cos((k + 2) * turn + phases[k]) for k in range(5))
    softness = float(rng.uniform(1.0, 8.0))
    alpha = np.clip(0.5 - (np.hypot(u, v) - edge) * radius / softness, 0, 1)[..., None]
    canvas += alpha * (colour - canvas)
    if kind == 3:
        pieces = OBJECTS[list(OBJECTS)[int(rng.integers(len(OBJECTS)))]](u, v)
        distance, _ = pieces[int(rng.integers(len(pieces)))]
        shapes.paint(canvas, distance, radius, COLOURS[names[int(rng.integers(len(names)))]])
    return np.clip(canvas, 0, 255).astype(np.uint8)
