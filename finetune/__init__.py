"""Stable Diffusion fine-tuning: from a folder of pictures to a verified LoRA adapter.

>>> from finetune import make_run
>>> run = make_run({"model": {"base": "demo"}, "data": {"folder": "photos"}, "output_dir": "runs/cat"})
>>> run.adapter.rank
16
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune.config import Run
from finetune.run_files import load_run, make_run

if TYPE_CHECKING:
    from finetune.artifact import build_artifact
    from finetune.demo.job import run_demo
    from finetune.export.run import export_run, exported_rows
    from finetune.families import load_family
    from finetune.sampling.generate import generate
    from finetune.training.trainer import train

__version__ = "0.1.0"

_ON_DEMAND = {
    "build_artifact": "finetune.artifact",
    "export_run": "finetune.export.run",
    "exported_rows": "finetune.export.run",
    "generate": "finetune.sampling.generate",
    "load_family": "finetune.families",
    "run_demo": "finetune.demo.job",
    "train": "finetune.training.trainer",
}
"""Public names whose modules import torch; loaded on first use, so that `finetune --help` answers at once."""

__all__ = [
    "Run",
    "build_artifact",
    "export_run",
    "exported_rows",
    "generate",
    "load_family",
    "load_run",
    "make_run",
    "run_demo",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the table above."""
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)
