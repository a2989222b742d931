"""Kill a training again and again; what comes out must be, byte for byte, what comes out of one that was never killed.

    python -m tests.campaigns.kill --runs 100          kills until 100 runs have survived; prints one line per run,
                                                       and at the end, at Ctrl-C or SIGTERM, the sums

Every run trains a tiny Stable Diffusion by the public `finetune.train`, each start in a forked process. One half of
the kills come at random times, the other half ahead of a random system call that changes the disk, within a save or
beside it; files not yet fsynced at that moment are torn, as by a power cut. The variants go round: AdamW and 8-bit
AdamW, with and without text encoder, one and two passes per step, dropout and EMA, keep 1 and 2. Compared are adapter,
running mean, optimizer state, history, spike memory and metrics (without the clock) with those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune import make_run, train
from finetune.demo.subjects import write_subject_pictures
from finetune.tracking import read_metrics
from finetune.training.optimizers import OPTIMIZERS  # noqa: F401 - imported before the forks, which is quicker
from tests.checkpoints import intercept
from tests.tiny import tiny_pipeline

STEPS = 7
MOST_STARTS = 200
"""A run that has not ended after so many is stuck."""


@dataclass(frozen=True)
class Variant:
    """One kind of run."""

    optimizer: str
    text_encoder: bool
    accumulation: int
    keep: int

    def __str__(self) -> str:
        text = "with text encoder" if self.text_encoder else "denoiser only"
        return f"{self.optimizer}, {text}, {self.accumulation} pass(es), keep {self.keep}"

    def document(self, folder: Path, output: Path) -> dict[str, Any]:
        """The run of this variant, as a recipe would say it."""
        return {
            "model": {"base": str(folder / "tiny")},
            "data": {
                "folder": str(folder / "pictures"), "flip": True, "caption_dropout": 0.2,
                "cache_folder": str(folder / "cache"),
            },
            "adapter": {"rank": 8, "dropout": 0.1},
            "text_encoder_adapter": {"rank": 4} if self.text_encoder else None,
            "optimizer": {"name": self.optimizer, "learning_rate": 1e-3, "warmup_steps": 2},
            "train": {
                "steps": STEPS, "batch_size": 2, "gradient_accumulation_steps": self.accumulation, "ema_decay": 0.9,
                "log_every": 1, "trackers": [], "gradient_checkpointing": False,
            },
            "validation": {"every": 3, "holdout": 1, "quantiles": 2},
            "checkpoint": {"every": 1, "keep": self.keep, "keep_best": True},
            "output_dir": str(output),
        }  # fmt: skip


VARIANTS = [
    Variant(optimizer, text, accumulation, keep)
    for optimizer, text, accumulation, keep in [
        ("adamw8bit", False, 1, 1), ("adamw", True, 2, 2), ("adamw8bit", True, 2, 1), ("adamw", False, 1, 2),
        ("adamw8bit", False, 2, 2), ("adamw", True, 1, 1), ("adamw8bit", True, 1, 2), ("adamw", False, 2, 1),
    ]
]  # fmt: skip


@dataclass
class Outcome:
    """What one run went through."""

    variant: Variant
    timed: int
    in_calls: int
    differing: list[str]

    def __str__(self) -> str:
        found = "equal to the byte" if not self.differing else f"DIFFERS: {', '.join(self.differing)}"
        return f"{self.variant}: {self.timed} random kills, {self.in_calls} ahead of a disk call; {found}"


class Campaign:
    """Kills runs of tiny models in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Write the base and the pictures."""
        self._folder = folder
        self._draw = random.Random(seed)
        self._whole: dict[Variant, dict[str, Any]] = {}
        self._seconds = 2.0
        tiny_pipeline(folder / "tiny")
        (folder / "pictures").mkdir()
        write_subject_pictures(folder / "pictures", 6)

    def run(self, number: int) -> Outcome:
        """One run of the variant whose turn it is, killed until it is done."""
        variant = VARIANTS[number % len(VARIANTS)]
        if variant not in self._whole:
            self._whole[variant] = self._uninterrupted(variant)
        output = self._folder / "run"
        outcome = Outcome(variant, 0, 0, [])
        for _ in range(MOST_STARTS):
            at_call = self._draw.randrange(1, 80) if self._draw.random() < 0.5 else None
            reached = _reached(output)
            ended = self._start(variant, output, at_call)
            # keep: a machine that became slower would be killed before it gets anywhere, over and over.
            if at_call is None and _reached(output) == reached:
                self._seconds *= 1.5
            if ended == 0:
                self._seconds *= 1.0 if at_call else 0.7
                break
            if ended != -signal.SIGKILL:
                outcome.differing.append(f"a start ended with {ended}")
                break
            outcome.in_calls += at_call is not None
            outcome.timed += at_call is None
        outcome.differing += _differences(self._whole[variant], _results(output))
        shutil.rmtree(output)
        return outcome

    def _uninterrupted(self, variant: Variant) -> dict[str, Any]:
        output = self._folder / "whole"
        started = time.perf_counter()
        ended = self._start(variant, output, None, kill=False)
        assert ended == 0, f"the uninterrupted run ended with {ended}"
        self._seconds = time.perf_counter() - started
        results = _results(output)
        shutil.rmtree(output)
        return results

    def _start(self, variant: Variant, output: Path, at_call: int | None, *, kill: bool = True) -> int:
        """One start in a forked process; its exit code, or minus the signal that ended it."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if at_call is not None:
                    intercept(lambda number, name, args: _die(number, at_call, name, args), pytest.MonkeyPatch())
                train(make_run(variant.document(self._folder, output)))
                code = 0
            finally:
                os._exit(code)
        try:
            if kill and at_call is None:
                time.sleep(self._draw.uniform(0.25, 0.95) * self._seconds)
                os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise


def _die(number: int, at: int, name: str, args: tuple[Any, ...]) -> None:
    if number < at:
        return
    if name == "fsync" and not os.path.isdir(f"/proc/self/fd/{args[0]}"):
        os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _reached(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


def _results(output: Path) -> dict[str, Any]:
    """Everything that must be equal to the bit."""
    last = output / f"checkpoint-{STEPS:06d}"
    parts = [last / f"{name}.safetensors" for name in ("adapter", "ema", "optimizer")]
    files = [output / "adapter.safetensors", *parts]
    found: dict[str, Any] = {str(path.relative_to(output)): path.read_bytes() for path in files if path.exists()}
    for name in ("validation.json", "meter.json"):
        found[name] = json.loads((last / name).read_text()) if (last / name).exists() else None
    lines = read_metrics(output / "metrics.jsonl")
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]
    found["folder"] = sorted(path.name for path in output.iterdir() if path.name != "cache")
    return found


def _differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    wrong = [name for name in expected | got if expected.get(name) != got.get(name)]
    if "folder" in wrong:
        wrong += sorted(set(expected["folder"]) ^ set(got["folder"]))
    return wrong


def outcomes(folder: Path, runs: int, seed: int) -> Iterator[Outcome]:
    """Run after run, as they end."""
    campaign = Campaign(folder, seed)
    for number in range(runs):
        yield campaign.run(number)


def main() -> int:
    """Parse the command line, kill, print; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40, help="runs to bring to their end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has begun it in the background
        signal.signal(number, signal.default_int_handler)
    number = timed = in_calls = bad = 0
    started = time.perf_counter()
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as scratch:
        for number, outcome in enumerate(outcomes(Path(scratch), options.runs, options.seed), 1):
            timed, in_calls, bad = timed + outcome.timed, in_calls + outcome.in_calls, bad + bool(outcome.differing)
            print(f"{number:4d}  {outcome}", flush=True)
    print(
        f"{number} runs, {timed + in_calls} kills ({timed} at random times, {in_calls} ahead of a disk call), "
        f"{bad} runs that differ, {time.perf_counter() - started:.0f} s"
    )
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
