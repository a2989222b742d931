"""Where metrics and sample sheets go besides the run folder: accelerate's trackers, each by its name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from finetune.config import Run, flatten
from finetune.errors import ConfigError
from finetune.tracking import Reporter

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "finetune"
"""What runs are gathered under; each tracker's own environment variable overrules it."""


@dataclass(frozen=True)
class Told:
    """What a tracker is told of a run.

    Attributes:
        name: that of its folder.
        folder: for what is kept on this machine.
        step: the last one that an earlier start has logged for good.
    """

    name: str
    folder: Path
    step: int


@dataclass(frozen=True)
class Service:
    """One of accelerate's trackers.

    Attributes:
        package: what pip calls it.
        variable: where its users name the project; empty if it has none.
        settings: what it takes besides the project, under its own names.
        help: what to do when it does not start.
        takes_fields: whether it has a place for the run's fields.
    """

    package: str
    variable: str
    settings: Callable[[Told], dict[str, Any]]
    help: str = ""
    takes_fields: bool = True


def _dvclive(told: Told) -> dict[str, Any]:
    # keep: unless told not to, it commits to the git repository that it stands in.
    return {"dir": str(told.folder / "dvclive"), "resume": told.step > 0, "save_dvc_exp": False}


TRACKERS = {
    "tensorboard": Service("tensorboard", "", lambda told: {"purge_step": told.step + 1}, takes_fields=False),
    "wandb": Service(
        "wandb", "WANDB_PROJECT", lambda told: {"dir": str(told.folder), "name": told.name, "group": told.name},
        "run `wandb login`, or set WANDB_MODE=offline",
    ),
    "trackio": Service("trackio", "TRACKIO_PROJECT", lambda told: {"name": told.name, "embed": False}),
    "mlflow": Service(
        "mlflow", "MLFLOW_EXPERIMENT_NAME", lambda told: {"run_name": told.name},
        "set MLFLOW_TRACKING_URI to a server or a database",
    ),
    "comet_ml": Service(
        "comet_ml", "COMET_PROJECT_NAME", lambda told: {}, "run `comet login`, or set COMET_START_ONLINE=0"
    ),
    "swanlab": Service(
        "swanlab", "SWANLAB_PROJECT",
        lambda told: {"experiment_name": told.name, "logdir": str(told.folder / "swanlog")},
        "run `swanlab login`, or set SWANLAB_MODE=local",
    ),
    "dvclive": Service("dvclive", "", _dvclive),
}  # fmt: skip
"""By the name of accelerate's and of the module; what takes no network as it is has no help."""


class Trackers:
    """Those of the first process; in every other, none. One that fails on the way is left out: a run outlives it."""

    def __init__(self, trackers: Sequence[GeneralTracker], reporter: Reporter) -> None:
        """Write to `trackers`, which have been started."""
        self._trackers = list(trackers)
        self._reporter = reporter

    def log(self, step: int, values: dict[str, Any]) -> None:
        """What was measured after `step` optimizer steps."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def show(self, step: int, sheet: Path) -> None:
        """A sample sheet, where there is a place for pictures."""
        with Image.open(sheet) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._each(lambda tracker: _show(tracker, step, pixels))

    def finish(self) -> None:
        """Let them write what they hold."""
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self._reporter.warn(
                    f"{tracker.name} failed ({_first_line(error)}) and is left out from here; metrics.jsonl goes on."
                )


def _show(tracker: GeneralTracker, step: int, pixels: np.ndarray) -> None:
    if hasattr(tracker, "log_images"):
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": pixels[None]}, step=step, **options)


def missing(names: Sequence[str]) -> list[str]:
    """What is to be installed for trackers of these names, in words."""
    return [
        f"train.trackers names {name}, which is not installed: `pip install {TRACKERS[name].package}`, or take it out: "
        "metrics.jsonl is always written, and `finetune watch` draws it."
        for name in names
        if importlib.util.find_spec(name) is None
    ]


def public_fields(run: Run) -> dict[str, Any]:
    """The run's fields by dotted name; of a path that tells where things lie, its last part."""

    def public(value: Any) -> Any:
        if isinstance(value, list):
            return [public(one) for one in value]
        if isinstance(value, dict):
            return {key: public(one) for key, one in value.items()}
        tells = isinstance(value, str) and value.startswith(("/", "~", ".."))
        return PurePath(value).name if tells else value

    return {key: public(value) for key, value in flatten(run).items()}


def start_trackers(run: Run, step: int, reporter: Reporter) -> Trackers:
    """Start what `train.trackers` names; only in the first process.

    Args:
        step: the step that the run goes on after; later ones are logged again.

    Raises:
        ConfigError: for a tracker that does not start, with what it says.
    """
    # keep: imports torch; what is not installed is told before that.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415

    told = Told(run.output_dir.resolve().name, run.output_dir, step)
    started = []
    for name in run.train.trackers:
        service = TRACKERS[name]
        kind = LOGGER_TYPE_TO_CLASS[name]
        # keep: TensorBoard's "project" is the folder it writes to.
        where = ("tracking", run.output_dir) if kind.requires_logging_directory else (_project(service),)
        try:
            tracker = kind(*where, **service.settings(told))
            tracker.start()
            if service.takes_fields:
                tracker.store_init_configuration(public_fields(run))
        except Exception as error:
            advice = f"{service.help}, or take" if service.help else "take"
            raise ConfigError(
                f"train.trackers names {name}, which did not start: {_first_line(error)}; {advice} it out."
            ) from error
        started.append(tracker)
    return Trackers(started, reporter)


def _project(service: Service) -> str:
    return os.environ.get(service.variable, PROJECT)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
