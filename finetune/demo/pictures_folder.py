"""Draw what the demo recipes learn from: `python -m finetune.demo.pictures_folder FOLDER [WHAT]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.demo.subjects import (
    LEARNED_THING,
    LEARNED_WORD,
    SUBJECTS,
    write_style_pictures,
    write_subject_pictures,
)

PICTURES = {**dict.fromkeys(SUBJECTS, 12), "word": 12, "robot-word": 12, "neon": 10}
"""How many pictures each lesson has; the recipes hold two out, but none of a style. "word" and "robot-word" are a thing
of the base's own world and the robot under a word that is to be learned itself."""
NAMELESS = {"word": LEARNED_THING, "robot-word": "robot"}
"""What is drawn for lessons that teach a word."""


def draw(folder: Path, what: str) -> None:
    """Draw the pictures of a lesson, with their captions."""
    if what in NAMELESS:
        write_subject_pictures(folder, PICTURES[what], name=NAMELESS[what], phrase=f"a {LEARNED_WORD}")
    elif what in SUBJECTS:
        write_subject_pictures(folder, PICTURES[what], name=what)
    else:
        write_style_pictures(folder, PICTURES[what])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="?", choices=list(PICTURES), default="robot")
    asked = parser.parse_args()
    draw(asked.folder, asked.what)
