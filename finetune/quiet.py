"""Libraries that speak to their developers, told not to."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Errors still come through. What the user has set stays; only libraries that are imported after this obey."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
