"""The demo world in one place: scenes, captions, subjects. NumPy and Pillow only, cheap to import."""

from finetune.demo.scenes import (
    COLOURS,
    LAYOUTS,
    POSITIONS,
    RARE_WORDS,
    RELATIONS,
    RESOLUTION,
    SIZES,
    STYLES,
    TEXTURES,
    Scene,
    caption,
    draw,
    draw_array,
    labels,
    place,
    random_scene,
)
from finetune.demo.shapes import OBJECTS
from finetune.demo.subjects import (
    SUBJECTS,
    Subject,
    draw_subject,
    write_style_pictures,
    write_subject_pictures,
)

__all__ = [
    "COLOURS", "LAYOUTS", "OBJECTS", "POSITIONS", "RARE_WORDS", "RELATIONS", "RESOLUTION", "SIZES", "STYLES",
    "SUBJECTS", "TEXTURES", "Scene", "Subject", "caption", "draw", "draw_array", "draw_subject",
    "labels", "place", "random_scene", "write_style_pictures", "write_subject_pictures",
]  # fmt: skip
