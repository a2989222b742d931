"""Trackers: metrics and sheets reach them, nothing private does, and none of them can end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune import train
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.run_files import make_run
from finetune.tracking import Reporter, read_metrics
from finetune.training import trackers
from finetune.training.trackers import TRACKERS, Trackers, public_fields, start_trackers

OFFLINE = {
    "WANDB_MODE": "offline", "COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": "comet", "SWANLAB_MODE": "local"
}  # fmt: skip


class Heard(Reporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Unplugged(GeneralTracker):
    """A tracker that cannot log in, and once started loses its server at step 2."""

    name = "unplugged"
    requires_logging_directory = False

    def __init__(self, project: str = "", **settings: Any) -> None:
        """Take what accelerate's own take."""
        super().__init__()

    def start(self) -> None:
        raise PermissionError("no key")

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == 2:
            raise ConnectionError("no route to host\nand more")


def short(document: dict[str, Any], *names: str) -> dict[str, Any]:
    document["train"] = {"steps": 2, "batch_size": 2, "log_every": 1, "trackers": list(names)}
    document["samples"] = {"prompts": ["a robot"], "per_prompt": 1, "inference_steps": 1, "every": 1}
    return document


def test_tensorboard_gets_every_value_and_a_picture_of_every_sheet(document):
    """What TensorBoard is opened for; and a later start continues the same curves."""
    run = make_run(short(document, "tensorboard"))
    train(run)
    events = EventAccumulator(str(run.output_dir / "tracking"), size_guidance={"images": 0}).Reload()
    logged = {line["step"]: line["loss"] for line in read_metrics(run.output_dir / "metrics.jsonl") if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(logged)
    assert [image.step for image in events.Images("samples")] == [0, 1, 2]


def test_the_table_is_what_a_run_may_name_and_accelerate_knows():
    """A name that is accepted and then unknown would be dropped in silence by accelerate."""
    literal = get_args(get_args(TrainConfig.model_fields["trackers"].annotation)[0])
    assert set(literal) == set(TRACKERS) <= set(tracking.LOGGER_TYPE_TO_CLASS)


def test_a_tracker_that_is_not_installed_is_refused(document, monkeypatch):
    """accelerate would drop it in silence, and the curves with it."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names trackio, which is not installed: `pip install trackio`"):
        train(make_run(short(document, "trackio")))


def test_a_tracker_that_does_not_start_is_told_with_what_to_do(document, monkeypatch):
    """No key, no network: the first words of a stranger's traceback and the remedy."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Unplugged)
    with pytest.raises(ConfigError, match=r"(?s)wandb, which did not start: no key; run `wandb login`.*out"):
        start_trackers(make_run(short(document, "wandb")), 0, Reporter())


def test_a_tracker_that_fails_on_the_way_is_left_out_and_said_once():
    """A server that is down for a minute must not cost a night of training."""
    heard = Heard()
    told = Trackers([Unplugged()], heard)
    for step in (1, 2, 2):
        told.log(step, {"loss": 1.0})
    assert heard.warnings == ["unplugged failed (no route to host) and is left out from here; metrics.jsonl goes on."]


def test_a_tracker_never_sees_where_things_lie(document):
    """Who looks at curves need not learn the user's name, the customer's or the disk's."""
    document["model"] = {"base": "/home/maria/models/mine.safetensors"}
    document["data"] = {"folder": "/home/maria/acme/photos", "caption_dropout": 0.25}
    document["adapter"] = {"rank": 4, "merge_first": ["~/loras/style.safetensors@0.8"]}
    document["output_dir"] = "/home/maria/acme/run"
    fields = public_fields(make_run(document))
    assert "maria" not in repr(fields) and "acme/" not in repr(fields) and "~" not in repr(fields)
    assert fields["adapter.rank"] == 4 and fields["data.caption_dropout"] == 0.25
    assert fields["model.base"] == "mine.safetensors" and fields["adapter.merge_first"] == ["style.safetensors@0.8"]


@pytest.mark.parametrize("name", sorted(TRACKERS.keys() - {"tensorboard"}))
def test_each_tracker_takes_a_run_without_a_network(name: str, document, tmp_path: Path, monkeypatch):
    """Where it is installed: started, fed, shown a sheet and finished, with no warning on the way."""
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for variable, value in OFFLINE.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    heard = Heard()
    train(make_run(short(document, name)), heard)
    assert not [line for line in heard.warnings if "left out" in line]
