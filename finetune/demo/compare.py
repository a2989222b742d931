"""Ways to teach the embedded base, side by side: `python -m finetune.demo.compare dreambooth dreambooth-without-prior`.

Every way is a shipped recipe, perhaps with some fields changed: its pictures are drawn, it trains, and it is asked the
same as the base. The folder gets NAME.json with a way's figures and LESSON.png, a contact sheet of all ways that teach
the same; what is there already and was made alike is not made again. Settings that are chosen by these figures should
be chosen under some `--seeds` and reported under others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune.config import Run
from finetune.console import ConsoleReporter
from finetune.demo import questions
from finetune.demo.job import ask_base, teach
from finetune.demo.pictures_folder import draw
from finetune.demo.questions import LESSONS, Figures, Measured
from finetune.demo.subjects import LEARNED_WORD
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


PIVOTAL = {"data.trigger": LEARNED_WORD, "tokens": {"words": {LEARNED_WORD: "robot"}, "learning_rate": 1e-2}}
"""A word that is learned takes the place of the rare one."""
WAYS: dict[str, Way] = {
    "dreambooth": Way("demo-dreambooth-lora"),
    "dreambooth-without-prior": Way("demo-dreambooth-lora", "robot", {"data.prior": None}),
    "text-encoder-off": Way("demo-dreambooth-lora", "robot", {"text_encoder_adapter": None}),
    "textual-inversion": Way("demo-textual-inversion", "word"),
    "textual-inversion-robot": Way("demo-textual-inversion", "robot-word", {"tokens.words": {LEARNED_WORD: "robot"}}),
    "pivotal-tuning": Way("demo-dreambooth-lora", "robot-word", PIVOTAL),
    "style": Way("demo-style-lora", "neon"),
    "style-without-prior": Way("demo-style-lora", "neon", {"data.prior": None}),
}
"""What can be compared, by name."""


@dataclass(frozen=True)
class Comparison:
    """Ways that are asked the same.

    Attributes:
        folder: gets NAME.json and a folder NAME for every way, and a sheet for every lesson.
        seeds: of the questions; see `questions.ask`.
        overrides: `section.field=value`, on top of every way's own changes.
        reporter: shows progress.
    """

    folder: Path
    seeds: Sequence[int] = (0, 1)
    overrides: Sequence[str] = ()
    reporter: Reporter = field(default_factory=Reporter)

    def of(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Teach in every way that was not made yet and draw the sheets; what every NAME.json holds."""
        found: dict[str, dict[str, Any]] = {}
        for lesson in dict.fromkeys(WAYS[name].lesson for name in names):
            alike = [name for name in names if WAYS[name].lesson == lesson]
            made = [name for name in alike if self._record(name)]
            base = self._measured(made[0], "before") if made else self._ask_base(alike[0])
            for name in alike:
                if name not in made:
                    self._make(name, base)
                found[name] = self._record(name)
                self.reporter.table(name, rows_of(found[name]))
            rows = [("base model", base), *((name, self._measured(name, "after")) for name in alike)]
            sheet = questions.sheet(LESSONS[lesson], self.folder / alike[0] / "pictures", rows, self.seeds[0])
            sheet.quantize(128).save(self.folder / f"{lesson}.png", optimize=True)
        return found

    def _run(self, name: str) -> Run:
        way, home = WAYS[name], self.folder / name
        values = {"data.folder": str(home / "pictures"), "output_dir": str(home / "run"), "export.formats": []}
        return load_run(way.recipe, self.overrides, values={**values, **way.changes})

    def _ask_base(self, name: str) -> Measured:
        return ask_base(self._run(name), LESSONS[WAYS[name].lesson], self.reporter, self.seeds)

    def _make(self, name: str, base: Measured) -> None:
        """Teach in one way, ask, and write figures and pictures."""
        way, run, started = WAYS[name], self._run(name), time.perf_counter()
        draw(run.data.folder, way.lesson)
        result, after = teach(run, LESSONS[way.lesson], self.reporter, self.seeds)
        for when, measured in (("before", base), ("after", after)):
            for index, picture in enumerate(measured.shown):
                picture.save(self.folder / name / f"{when}-{index}.png")
        found = {
            "run": run.digest(),
            "seeds": list(self.seeds),
            "recipe": way.recipe,
            "changes": {**way.changes, **dict(text.split("=", 1) for text in self.overrides)},
            "word": LESSONS[way.lesson].word,
            "before": base.figures.as_dict(),
            "after": after.figures.as_dict(),
            "steps": result.steps,
            "training_seconds": round(result.seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(self.folder / f"{name}.json", found)

    def _record(self, name: str) -> dict[str, Any]:
        """What NAME.json holds, if it was made with the same run and seeds; else nothing."""
        file = self.folder / f"{name}.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        alike = (found.get("run"), found.get("seeds")) == (self._run(name).digest(), list(self.seeds))
        return found if alike else {}

    def _measured(self, name: str, when: str) -> Measured:
        """The figures and pictures of a way that was made; `when` is before or after."""
        figures = Figures(**self._record(name)[when])
        count = sum(map(len, questions.SHOWN))
        return Measured(figures, [Image.open(self.folder / name / f"{when}-{i}.png") for i in range(count)])


FIGURES = {
    "with_trigger": "taught, with its word",
    "called_right": "... and everything else in the prompt right",
    "without_trigger": "taught, same prompts without the word",
    "class_kept": "class kept without the word",
    "ordinary": "other prompts followed",
}
"""The figures that are shown, and what they are called."""


def rows_of(found: dict[str, Any]) -> Rows:
    """One way's table: every figure before and after."""
    before, after = found["before"], found["after"]
    rows = [(text, f"{before[key]:4.0%} -> {after[key]:4.0%}") for key, text in FIGURES.items()]
    time_taken = f"{found['seconds']:.0f} s, of which training {found['training_seconds']:.0f} s"
    return [*rows, ("pictures judged", " + ".join(map(str, after["pictures"]))), ("time", time_taken)]


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the questions; default: 0 1")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of all")
    asked = parser.parse_args()
    unknown = [name for name in asked.ways if name not in WAYS]
    if unknown:
        parser.error(f"there is no way called {', '.join(unknown)}; choose from {', '.join(WAYS)}")
    # keep: a model this small gains nothing from a second thread, and loses tenfold when others want the core.
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    reporter = ConsoleReporter()
    try:
        Comparison(asked.out, asked.seeds, asked.set, reporter).of(asked.ways)
    except UserError as error:
        reporter.warn(str(error))
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
