"""What a configuration names by its import path, such as `torch.optim.RAdam` or `my_losses.weight`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def import_by_path(path: str) -> Any:
    """The object that `package.module.name` names; modules in the working directory are found, after all others.

    Raises:
        ModuleNotFoundError: if there is no such module.
        AttributeError: if it has no such name.
    """
    module, _, name = path.rpartition(".")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        if added:
            sys.path.remove(here)
