"""`finetune demo --family`: the whole job on the tiny twin of a family, so that anyone can see its path work.

A twin has random weights and draws nothing; what is shown is that every stage runs and its files are read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_tools.errors import counted
from finetune.config import Run
from finetune.demo.subjects import write_subject_pictures
from finetune.export.run import export_run, exported_rows
from finetune.families.twins import RESOLUTION, TWINS, write_twin
from finetune.run_files import make_run
from finetune.storage import write_json
from finetune.tracking import Reporter, Rows
from finetune.training.trainer import TrainResult, train

PICTURES = 8
STEPS = 20


def run_twin_demo(name: str, output: Path, reporter: Reporter) -> dict[str, Any]:
    """Make a family's twin and pictures, train an adapter, validate, render samples, export, verify.

    Args:
        name: a family, a key of TWINS.
        output: gets base/, pictures/, run/, exports/ and summary.json; a second call goes on from there.

    Returns:
        what summary.json holds.
    """
    # keep: a model this small gains nothing from a second thread, and loses tenfold when others want the core.
    torch.set_num_threads(1)
    run = twin_run(name, output)
    if not (output / "base" / "model_index.json").is_file():
        write_twin(name, output / "base")
    write_subject_pictures(run.data.folder, PICTURES)
    reporter.note(
        f"The twin of {name} is the real architecture at toy size with random weights: it cannot draw, but every stage "
        "of the job runs on it."
    )
    result = train(run, reporter)
    exported = export_run(run.output_dir, run, output / "exports", reporter)
    summary = {
        "family": name,
        "steps": result.steps,
        "trained": len(result.adapter.tensors),
        "loss_over_base": result.validation.value if result.validation else None,
        "exports": [item.path.name for item in exported],
    }
    write_json(output / "summary.json", summary)
    reporter.table("What ran", _rows(run, result))
    reporter.table("Each file read back and compared", exported_rows(exported))
    return summary


def twin_run(name: str, output: Path) -> Run:
    """A small complete run on a twin, writing below `output`."""
    # keep: kohya's layout is read by programs for UNets only; transformers are exchanged in diffusers' layout.
    formats = ["diffusers", *(["kohya"] if "unet" in TWINS[name]().networks else []), "merged"]
    return make_run(
        {
            "model": {"base": str(output / "base")},
            "data": {"folder": str(output / "pictures"), "trigger": "sks", "resolution": RESOLUTION, "flip": True},
            "adapter": {"rank": 4},
            "text_encoder_adapter": {"rank": 4},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": STEPS, "batch_size": 4, "log_every": 5, "trackers": []},
            "validation": {"every": 10, "holdout": 2, "quantiles": 4},
            "samples": {"prompts": ["a sks robot"], "inference_steps": 4, "guidance_scale": 3.0},
            "checkpoint": {"every": 10},
            "export": {"formats": formats, "dtype": "fp32", "name": f"sks-{name}"},
            "output_dir": str(output / "run"),
        }
    )


def _rows(run: Run, result: TrainResult) -> Rows:
    value = "off" if result.validation is None else f"{result.validation.value:.3f} of the base's loss"
    networks = ", ".join(result.components.modules())
    return [
        ("Family", f"{result.family.name}: {result.family.pipeline_class}"),
        ("Networks", networks),
        ("Trained", f"{len(result.adapter.tensors)} tensors, {counted(result.steps, 'step')}, validation {value}"),
        ("Samples", str(run.output_dir / "samples")),
    ]
