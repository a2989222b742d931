"""Stable Diffusion fine-tuning: from a folder of pictures to a verified LoRA adapter.

>>> from finetune import make_run
>>> run = make_run({"model": {"base": "demo"}, "data": {"folder": "photos"}, "output_dir": "runs/cat"})
>>> run.adapter.rank
16
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune.quiet import quiet_libraries
from finetune.version import VERSION

if TYPE_CHECKING:
    from finetune.artifact import build_artifact
    from finetune.config import Run
    from finetune.console import ConsoleReporter
    from finetune.data.upkeep import inspect_cache, prune_cache
    from finetune.demo.job import run_demo
    from finetune.demo.twin_job import run_twin_demo
    from finetune.export.publish import push_folder
    from finetune.export.run import export_run, exported_rows
    from finetune.families import load_family
    from finetune.interchange.commands import (
        convert_adapter,
        extract_adapter,
        merge_adapters,
        merge_into_base,
        resize_adapter,
    )
    from finetune.interchange.comparing import diff_adapters
    from finetune.interchange.inspection import inspect_file
    from finetune.pictures import sample, sample_again
    from finetune.run_files import load_run, make_run
    from finetune.sampling.again import model_again, wanted_again
    from finetune.sampling.generate import generate
    from finetune.sampling.papers import shot_of
    from finetune.sampling.wanted import Wanted, model_of
    from finetune.training.checkpoint import checkpoint_adapter
    from finetune.training.planning import plan_run
    from finetune.training.resume import Resume
    from finetune.training.trainer import train

__version__ = VERSION

_ON_DEMAND = {
    "ConsoleReporter": "finetune.console",
    "Resume": "finetune.training.resume",
    "Run": "finetune.config",
    "Wanted": "finetune.sampling.wanted",
    "build_artifact": "finetune.artifact",
    "checkpoint_adapter": "finetune.training.checkpoint",
    "convert_adapter": "finetune.interchange.commands",
    "diff_adapters": "finetune.interchange.comparing",
    "export_run": "finetune.export.run",
    "exported_rows": "finetune.export.run",
    "extract_adapter": "finetune.interchange.commands",
    "generate": "finetune.sampling.generate",
    "inspect_cache": "finetune.data.upkeep",
    "inspect_file": "finetune.interchange.inspection",
    "load_family": "finetune.families",
    "load_run": "finetune.run_files",
    "make_run": "finetune.run_files",
    "merge_adapters": "finetune.interchange.commands",
    "merge_into_base": "finetune.interchange.commands",
    "plan_run": "finetune.training.planning",
    "prune_cache": "finetune.data.upkeep",
    "push_folder": "finetune.export.publish",
    "resize_adapter": "finetune.interchange.commands",
    "model_again": "finetune.sampling.again",
    "model_of": "finetune.sampling.wanted",
    "run_demo": "finetune.demo.job",
    "run_twin_demo": "finetune.demo.twin_job",
    "sample": "finetune.pictures",
    "sample_again": "finetune.pictures",
    "shot_of": "finetune.sampling.papers",
    "train": "finetune.training.trainer",
    "wanted_again": "finetune.sampling.again",
}
"""Public names and their modules, imported on first use: most need torch, and `finetune --help` must answer at once."""

__all__ = [
    "ConsoleReporter",
    "Resume",
    "Run",
    "Wanted",
    "build_artifact",
    "checkpoint_adapter",
    "convert_adapter",
    "diff_adapters",
    "export_run",
    "exported_rows",
    "extract_adapter",
    "generate",
    "inspect_cache",
    "inspect_file",
    "load_family",
    "load_run",
    "make_run",
    "merge_adapters",
    "merge_into_base",
    "model_again",
    "model_of",
    "plan_run",
    "prune_cache",
    "push_folder",
    "resize_adapter",
    "run_demo",
    "run_twin_demo",
    "sample",
    "sample_again",
    "shot_of",
    "train",
    "wanted_again",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the table above."""
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    quiet_libraries()
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)
