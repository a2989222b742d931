"""Ways to teach the embedded base, side by side: `python -m finetune.demo.compare dreambooth dreambooth-without-prior`.

Every way is a shipped recipe, perhaps with some fields changed. Its pictures are drawn, the base is asked, the recipe
trains, and the same prompts are asked again. The folder gets NAME.json with the figures and NAME.png, a contact sheet;
what is there already and was made with the same recipe is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.console import ConsoleReporter
from finetune.demo import questions
from finetune.demo.job import teach
from finetune.demo.pictures_folder import draw
from finetune.demo.questions import LESSONS
from finetune.errors import UserError
from finetune.run_files import load_run
from finetune.storage import write_json
from finetune.tracking import Reporter, Rows


@dataclass(frozen=True)
class Way:
    """One way to teach.

    Attributes:
        recipe: a built-in recipe's name.
        lesson: a name in LESSONS.
        changes: dotted fields of the recipe that are different.
    """

    recipe: str
    lesson: str = "robot"
    changes: dict[str, Any] = field(default_factory=dict)


WAYS: dict[str, Way] = {
    "dreambooth": Way("demo-dreambooth-lora"),
    "dreambooth-without-prior": Way("demo-dreambooth-lora", changes={"data.prior": None}),
    "text-encoder-on": Way("demo-text-encoder-lora"),
    "text-encoder-off": Way("demo-text-encoder-lora", changes={"text_encoder_adapter": None}),
    "style": Way("demo-style-lora", "neon"),
}
"""What can be compared, by name."""


def run_way(name: str, folder: Path, overrides: list[str], reporter: Reporter) -> dict[str, Any]:
    """Teach in one way and measure it.

    Args:
        name: a key of WAYS.
        folder: gets NAME.json, NAME.png and a folder NAME with pictures and the run.
        overrides: `section.field=value`, on top of the way's own changes.
        reporter: shows progress.

    Returns:
        what NAME.json holds.
    """
    way, home = WAYS[name], folder / name
    pictures = home / "pictures"
    values = {"data.folder": str(pictures), "output_dir": str(home / "run"), "export.formats": []}
    run = load_run(way.recipe, overrides, values={**values, **way.changes})
    record = folder / f"{name}.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if found["run"] == run.digest():
            return found
    draw(pictures, way.lesson)
    lesson, started = LESSONS[way.lesson], time.perf_counter()
    before, after, result = teach(run, lesson, reporter)
    rows = [("base model", before), (name, after)]
    picture = questions.sheet(lesson, pictures, rows)
    picture.quantize(128).save(folder / f"{name}.png", optimize=True)
    found = {
        "run": run.digest(),
        "recipe": way.recipe,
        "changes": {**way.changes, **_pairs(overrides)},
        "word": lesson.word,
        "kind": lesson.kind,
        "before": before.figures.as_dict(),
        "after": after.figures.as_dict(),
        "steps": result.steps,
        "training_seconds": round(result.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(record, found)
    return found


def _pairs(overrides: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in overrides)


QUESTIONS = {
    "with_trigger": "taught, with its word",
    "called_right": "... and everything else in the prompt right",
    "without_trigger": "taught, same prompts without the word",
    "class_kept": "class kept without the word",
    "ordinary": "other prompts followed",
}
"""The figures that are shown, and what they are called."""


def rows_of(found: dict[str, Any]) -> Rows:
    """One way's table: every question before and after."""
    before, after = found["before"], found["after"]
    rows = [(text, f"{before[key]:4.0%} -> {after[key]:4.0%}") for key, text in QUESTIONS.items()]
    return [*rows, ("time", f"{found['seconds']:.0f} s, of which training {found['training_seconds']:.0f} s")]


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.ways if name not in WAYS]
    if unknown:
        parser.error(f"there is no way called {', '.join(unknown)}; choose from {', '.join(WAYS)}")
    # keep: a model this small gains nothing from a second thread, and loses tenfold when others want the core.
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    reporter = ConsoleReporter()
    try:
        for name in arguments.ways:
            reporter.table(name, rows_of(run_way(name, arguments.out, arguments.set, reporter)))
    except UserError as error:
        reporter.warn(str(error))
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
