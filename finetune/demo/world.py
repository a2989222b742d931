"""The demo world in one place: scenes, captions, subjects, prompts. NumPy and Pillow only, cheap to import."""

from finetune.demo.scenes import (
    COLOURS,
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
    random_scene,
)
from finetune.demo.shapes import OBJECTS
from finetune.demo.subjects import (
    PROMPTS,
    SUBJECTS,
    Prompt,
    Subject,
    draw_subject,
    write_style_pictures,
    write_subject_pictures,
)

__all__ = [
    "COLOURS", "OBJECTS", "POSITIONS", "PROMPTS", "RARE_WORDS", "RELATIONS", "RESOLUTION", "SIZES", "STYLES",
    "SUBJECTS", "TEXTURES", "Prompt", "Scene", "Subject", "caption", "draw", "draw_array", "draw_subject",
    "random_scene", "write_style_pictures", "write_subject_pictures",
]  # fmt: skip
