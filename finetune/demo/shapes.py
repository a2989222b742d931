"""Signed-distance drawing of the demo world's objects.

An object is a list of parts. A part is a signed distance (negative inside, in units of the object's radius) and the
role of its colour. Coordinates `u` (to the right) and `v` (downwards) span -1 to 1 over the object. Edges are one
pixel soft, so pictures are anti-aliased without supersampling.

Formulas of the primitives: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Part = tuple[Array, str]
ObjectDrawer = Callable[[Array, Array], list[Part]]
RGB = tuple[float, float, float]


def circle(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    """Distance to a disc."""
    return np.hypot(u - x, v - y) - radius


def ellipse(u: Array, v: Array, x: float, y: float, rx: float, ry: float) -> Array:
    """Distance to an ellipse; first order, exact enough within a pixel of the edge."""
    du, dv = u - x, v - y
    level = np.hypot(du / rx, dv / ry)
    slope = np.hypot(du / rx**2, dv / ry**2) + 1e-6
    return level * (level - 1.0) / slope


def box(u: Array, v: Array, x: float, y: float, half_w: float, half_h: float, corner: float = 0.0) -> Array:
    """Distance to a rectangle with rounded corners."""
    qx = np.abs(u - x) - half_w + corner
    qy = np.abs(v - y) - half_h + corner
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner


def segment(u: Array, v: Array, a: tuple[float, float], b: tuple[float, float], thickness: float) -> Array:
    """Distance to a thick line with round ends."""
    bu, bv = b[0] - a[0], b[1] - a[1]
    share = np.clip(((u - a[0]) * bu + (v - a[1]) * bv) / (bu * bu + bv * bv), 0, 1)
    return np.hypot(u - a[0] - share * bu, v - a[1] - share * bv) - thickness


def polygon(u: Array, v: Array, points: list[tuple[float, float]]) -> Array:
    """Distance to a closed polygon given by its corners."""
    squared = np.full(u.shape, np.inf, dtype=np.float32)
    inside = np.zeros(u.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
        share = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * share) ** 2 + (wy - ey * share) ** 2)
        above, below, left = v >= ay, v < by, ex * wy > ey * wx
        inside ^= (above & below & left) | (~above & ~below & ~left)
    return np.sqrt(squared) * np.where(inside, -1.0, 1.0)


def join(*distances: Array) -> Array:
    """Union of shapes."""
    return np.minimum.reduce(distances)


def _ball(u: Array, v: Array) -> list[Part]:
    return [(circle(u, v, 0, 0, 0.95), "body"), (ellipse(u, v, -0.32, -0.36, 0.22, 0.16), "light")]


def _box(u: Array, v: Array) -> list[Part]:
    return [(box(u, v, 0, 0, 0.82, 0.82), "body"), (box(u, v, 0, 0, 0.13, 0.82), "shade")]


def _triangle(u: Array, v: Array) -> list[Part]:
    return [(polygon(u, v, [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]), "body")]


STAR = [
    (float(r * np.sin(np.pi * k / 5)), float(0.06 - r * np.cos(np.pi * k / 5))) for k, r in enumerate([1.05, 0.44] * 5)
]
HEART = [
    (
        float(np.sin(t) ** 3),
        float(-(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16),
    )
    for t in np.linspace(0, 2 * np.pi, 25)[:-1]
]


def _star(u: Array, v: Array) -> list[Part]:
    return [(polygon(u, v, STAR), "body")]


def _heart(u: Array, v: Array) -> list[Part]:
    return [(polygon(u, v, HEART), "body")]


def _house(u: Array, v: Array) -> list[Part]:
    return [
        (box(u, v, 0, 0.42, 0.72, 0.53), "body"),
        (polygon(u, v, [(0.0, -0.98), (1.0, -0.08), (-1.0, -0.08)]), "shade"),
        (box(u, v, -0.3, 0.58, 0.17, 0.37), "ink"),
        (box(u, v, 0.33, 0.4, 0.2, 0.2), "light"),
    ]


def _tree(u: Array, v: Array) -> list[Part]:
    crown = join(circle(u, v, 0, -0.48, 0.5), circle(u, v, -0.45, -0.08, 0.44), circle(u, v, 0.45, -0.08, 0.44))
    return [(box(u, v, 0, 0.55, 0.17, 0.45), "wood"), (crown, "body")]


def _car(u: Array, v: Array) -> list[Part]:
    return [
        (polygon(u, v, [(-0.6, 0.0), (-0.38, -0.5), (0.3, -0.5), (0.62, 0.0)]), "body"),
        (polygon(u, v, [(-0.4, 0.0), (-0.27, -0.34), (-0.06, -0.34), (-0.06, 0.0)]), "light"),
        (polygon(u, v, [(0.08, 0.0), (0.08, -0.34), (0.24, -0.34), (0.42, 0.0)]), "light"),
        (box(u, v, 0, 0.17, 1.0, 0.24, 0.12), "body"),
        (circle(u, v, -0.52, 0.42, 0.25), "ink"),
        (circle(u, v, 0.52, 0.42, 0.25), "ink"),
        (circle(u, v, -0.52, 0.42, 0.1), "light"),
        (circle(u, v, 0.52, 0.42, 0.1), "light"),
    ]


def _fish(u: Array, v: Array) -> list[Part]:
    return [
        (polygon(u, v, [(0.35, 0.0), (1.0, -0.52), (0.88, 0.0), (1.0, 0.52)]), "shade"),
        (polygon(u, v, [(-0.25, -0.35), (0.3, -0.72), (0.3, -0.3)]), "shade"),
        (ellipse(u, v, -0.22, 0, 0.76, 0.5), "body"),
        (circle(u, v, -0.6, -0.1, 0.14), "light"),
        (circle(u, v, -0.62, -0.1, 0.07), "ink"),
    ]


def _mushroom(u: Array, v: Array) -> list[Part]:
    cap = np.maximum(ellipse(u, v, 0, 0.05, 1.0, 0.98), v - 0.08)
    return [
        (box(u, v, 0, 0.5, 0.3, 0.46, 0.12), "cream"),
        (cap, "body"),
        (circle(u, v, -0.48, -0.26, 0.16), "light"),
        (circle(u, v, 0.08, -0.56, 0.18), "light"),
        (circle(u, v, 0.52, -0.2, 0.14), "light"),
    ]


def _robot(u: Array, v: Array) -> list[Part]:
    return [
        (box(u, v, 0, -0.86, 0.05, 0.14), "shade"),
        (box(u, v, -0.28, 0.8, 0.15, 0.2), "shade"),
        (box(u, v, 0.28, 0.8, 0.15, 0.2), "shade"),
        (box(u, v, -0.72, 0.22, 0.13, 0.32), "shade"),
        (box(u, v, 0.72, 0.22, 0.13, 0.32), "shade"),
        (box(u, v, 0, 0.27, 0.54, 0.38), "body"),
        (box(u, v, 0, -0.43, 0.46, 0.32), "body"),
        (box(u, v, -0.2, -0.48, 0.11, 0.11), "light"),
        (box(u, v, 0.2, -0.48, 0.11, 0.11), "light"),
        (box(u, v, 0, -0.2, 0.24, 0.05), "ink"),
    ]


def _cat(u: Array, v: Array) -> list[Part]:
    ears = join(
        polygon(u, v, [(-0.85, -0.98), (-0.1, -0.5), (-0.78, 0.0)]),
        polygon(u, v, [(0.85, -0.98), (0.78, 0.0), (0.1, -0.5)]),
    )
    whiskers = join(
        segment(u, v, (0.4, 0.32), (1.0, 0.2), 0.025),
        segment(u, v, (0.4, 0.42), (1.0, 0.5), 0.025),
        segment(u, v, (-0.4, 0.32), (-1.0, 0.2), 0.025),
        segment(u, v, (-0.4, 0.42), (-1.0, 0.5), 0.025),
    )
    return [
        (ears, "body"),
        (ellipse(u, v, 0, 0.12, 0.86, 0.76), "body"),
        (ellipse(u, v, -0.34, -0.04, 0.17, 0.2), "light"),
        (ellipse(u, v, 0.34, -0.04, 0.17, 0.2), "light"),
        (ellipse(u, v, -0.34, -0.04, 0.07, 0.17), "ink"),
        (ellipse(u, v, 0.34, -0.04, 0.07, 0.17), "ink"),
        (polygon(u, v, [(-0.12, 0.28), (0.12, 0.28), (0.0, 0.44)]), "ink"),
        (whiskers, "ink"),
    ]


OBJECTS: dict[str, ObjectDrawer] = {
    "ball": _ball,
    "box": _box,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "fish": _fish,
    "mushroom": _mushroom,
    "robot": _robot,
    "cat": _cat,
}


def subject_robot(u: Array, v: Array) -> list[Part]:
    """The demo subject: lime body and feet, magenta dome with two thick antennae, one big navy eye."""
    dome = np.maximum(circle(u, v, 0, -0.1, 0.6), v + 0.1)
    antennae = join(segment(u, v, (-0.2, -0.5), (-0.5, -0.8), 0.13), segment(u, v, (0.2, -0.5), (0.5, -0.8), 0.13))
    feet = join(*(segment(u, v, (0.4 * k, 0.6), (0.45 * k, 0.82), 0.2) for k in (-1, 1)))
    return [
        (antennae, "magenta"),
        (join(feet, ellipse(u, v, 0, 0.3, 0.8, 0.52)), "lime"),
        (dome, "magenta"),
        (circle(u, v, 0, -0.15, 0.24), "navy"),
    ]


def subject_fish(u: Array, v: Array) -> list[Part]:
    """The second demo subject: a round teal fish with a gold band and a tall gold sail, a violet tail, a white eye."""
    body = circle(u, v, -0.15, 0.12, 0.68)
    return [
        (polygon(u, v, [(0.3, 0.12), (1.0, -0.5), (1.0, 0.75)]), "violet"),
        (polygon(u, v, [(-0.6, -0.2), (-0.15, -0.98), (0.35, -0.2)]), "gold"),
        (body, "teal"),
        (np.maximum(body, np.abs(u - 0.1) - 0.15), "gold"),
        (circle(u, v, -0.4, 0.0, 0.2), "white"),
    ]


SUBJECT_DRAWERS: dict[str, ObjectDrawer] = {"robot": subject_robot, "fish": subject_fish}
SUBJECT_PALETTE: dict[str, RGB] = {
    "lime": (165, 240, 40),
    "magenta": (225, 20, 140),
    "navy": (25, 30, 90),
    "white": (250, 250, 250),
    "teal": (15, 130, 125),
    "gold": (235, 180, 30),
    "violet": (150, 90, 220),
}


def palette(colour: RGB) -> dict[str, RGB]:
    """Colours of the roles for an object of one body colour, channels in 0..255."""
    red, green, blue = colour
    bright = 0.3 * red + 0.59 * green + 0.11 * blue
    dark = bright < 60
    shade: RGB = (red + 65, green + 65, blue + 70) if dark else (red * 0.62, green * 0.62, blue * 0.62)
    light: RGB = (190, 205, 220) if bright > 225 else (250, 250, 250)
    ink: RGB = (225, 225, 230) if dark else (22, 22, 28)
    return {
        "body": colour,
        "shade": shade,
        "light": light,
        "ink": ink,
        "wood": (120, 78, 45),
        "cream": (240, 226, 196),
    }


def local_grid(height: int, width: int, x: float, y: float, radius: float, angle: float = 0.0) -> tuple[Array, Array]:
    """Object coordinates of every pixel centre.

    Args:
        height: rows in pixels.
        width: columns in pixels.
        x: centre of the object in pixels from the left.
        y: centre of the object in pixels from the top.
        radius: half the extent of the object in pixels.
        angle: turn in radians.

    Returns:
        `u` and `v`, each of shape (height, width), 1.0 at `radius` from the centre.
    """
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    du, dv = (columns - np.float32(x)) / np.float32(radius), (rows - np.float32(y)) / np.float32(radius)
    if angle == 0.0:
        return du, dv
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * du + s * dv, c * dv - s * du


def coverage(distance: Array, radius: float) -> Array:
    """Share of each pixel that a shape covers; shape (H, W, 1), 0..1. `distance` is in units of `radius` pixels."""
    return np.clip(0.5 - distance * radius, 0, 1)[..., None]


def paint(canvas: Array, distance: Array, radius: float, colour: Array | RGB) -> None:
    """Lay one shape over a float canvas of shape (H, W, 3), in place. `colour` is one RGB or a picture of them."""
    alpha = coverage(distance, radius).astype(np.float32)
    canvas += alpha * (np.asarray(colour, dtype=np.float32) - canvas)
