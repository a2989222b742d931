"""`finetune demo`: the whole job, from pictures to a verified adapter, on the embedded base model."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.config import Run
from finetune.demo import questions
from finetune.demo.checker import load_checker
from finetune.demo.pictures_folder import PICTURES, draw
from finetune.demo.questions import LESSONS, Figures, Lesson, Measured
from finetune.export.exporting import Exported
from finetune.export.run import export_run, exported_rows
from finetune.families import load_family
from finetune.families.base import Components, ModelFamily
from finetune.run_files import load_run, recipe_names
from finetune.storage import write_json
from finetune.tracking import Reporter, Rows
from finetune.training.trainer import TrainResult, train

RECIPE = "demo-dreambooth-lora"
SUBJECT = "robot"


def run_demo(output: Path, reporter: Reporter) -> dict[str, Any]:
    """Draw a subject, teach it to the embedded base, measure, export, and say what came out.

    Args:
        output: gets pictures/, run/, exports/, contact_sheet.png and summary.json; a second call goes on from there.

    Returns:
        what summary.json holds: every figure that is shown.
    """
    started = time.perf_counter()
    # keep: a model this small gains nothing from a second thread, and loses tenfold when others want the core.
    torch.set_num_threads(1)
    run = demo_run(output)
    draw(run.data.folder, SUBJECT)
    reporter.note(f"{PICTURES[SUBJECT]} pictures of a robot that the base model has never seen: {run.data.folder}")
    lesson = LESSONS[SUBJECT].halved()
    before = ask_base(run, lesson, reporter)
    result, after = teach(run, lesson, reporter)
    asked = [("base model", before), ("with the adapter", after)]
    questions.sheet(lesson, run.data.folder, asked).save(output / "contact_sheet.png")
    exported = export_run(run.output_dir, run, output / "exports", reporter)
    summary = _summary(before.figures, after.figures, result, exported, time.perf_counter() - started)
    write_json(output / "summary.json", summary)
    for title, rows in pages(output, run, summary, exported):
        reporter.table(title, rows)
    return summary


def ask_base(run: Run, lesson: Lesson, reporter: Reporter, seeds: Sequence[int] = (0,)) -> Measured:
    """What the run's base makes of a lesson's prompts before anything is taught."""
    family, components = load_family(run.model.base)
    return _ask("Testing the base model", family, components, lesson, reporter, seeds)


def teach(
    run: Run, lesson: Lesson, reporter: Reporter, seeds: Sequence[int] = (0,)
) -> tuple[TrainResult, Measured]:
    """Train, and ask the same prompts with the same seeds."""
    result = train(run, reporter)
    return result, _ask("Testing the adapter", result.family, result.components, lesson, reporter, seeds)


def _ask(
    title: str, family: ModelFamily, components: Components, lesson: Lesson, reporter: Reporter, seeds: Sequence[int]
) -> Measured:
    pictures = sum(len(group) for seed in seeds for group in lesson.groups(seed))
    with reporter.progress(title, pictures) as advance:
        return questions.ask(family, components, load_checker(), lesson, advance, seeds)


def demo_run(output: Path) -> Run:
    """The shipped recipe, writing below `output`."""
    places = {"data.folder": str(output / "pictures"), "output_dir": str(output / "run")}
    return load_run(recipe_names()[RECIPE], values=places)


def _summary(
    before: Figures, after: Figures, result: TrainResult, exported: list[Exported], seconds: float
) -> dict[str, Any]:
    return {
        "before": before.as_dict(),
        "after": after.as_dict(),
        "validation": None if result.validation is None else {
            "loss_over_base": result.validation.value,
        },
        "steps": result.steps,
        "training_seconds": round(result.seconds, 1),
        "seconds": round(seconds, 1),
        "peak_memory_mb": _peak_memory_mb(),
        "exports": [
            {
                "format": item.format,
                "path": item.path.name,
                "bytes": item.bytes,
                "verified": [check.as_dict() for check in item.verification],
            }
            for item in exported
        ],
    }  # fmt: skip


def pages(output: Path, run: Run, summary: dict[str, Any], exported: list[Exported]) -> list[tuple[str, Rows]]:
    """The closing tables: what was learned, where it is, what to type next."""
    before, after, validation = summary["before"], summary["after"], summary["validation"]

    def change(key: str, group: int) -> str:
        return f"{before[key]:4.0%} -> {after[key]:4.0%}   of {before['pictures'][group]} pictures"

    learned = [
        ('Subject, with "sks" in the prompt', change("with_trigger", 0)),
        ("Subject, same prompts without it", change("without_trigger", 1)),
        ("Ordinary robots stay robots", change("class_kept", 1)),
        ("Other prompts still followed", change("ordinary", 2)),
        ("Loss on held-out pictures",
         f"{validation['loss_over_base']:.3f} of the base's"),
        ("Time and memory", f"{summary['seconds']:.0f} s, of which training {summary['training_seconds']:.0f} s; "
                            f"{summary['peak_memory_mb']:.0f} MB at most"),
    ]  # fmt: skip
    where = [("Contact sheet", str(output / "contact_sheet.png")), ("Every figure", str(output / "summary.json"))]
    following = [
        ("Your own pictures", "finetune init sd15-dreambooth-lora > my.yaml"),
        ("", "edit data.folder and the captions, then: finetune train my.yaml"),
        ("Every field and its meaning", f"finetune show {run.output_dir}"),
    ]
    return [
        ("What was learned (before -> after, judged on new pictures)", learned),
        ("Where it is, each file read back and compared", [*exported_rows(exported), *where]),
        ("What to type next", following),
    ]


def _peak_memory_mb() -> int:
    """The process's largest resident size so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
