"""Draw the demo subject's pictures into a folder: `python -m finetune.demo.pictures_folder FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.demo.world import write_subject_pictures

PICTURES = 12
"""How many pictures the demo learns from; two of them are held out."""

if __name__ == "__main__":
    write_subject_pictures(Path(sys.argv[1]), PICTURES)
