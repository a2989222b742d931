"""The best checkpoint stays, a run that no longer gets better ends, and a resume knows both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import make_run, train
from finetune.adapters.files import AdapterFile
from finetune.errors import CheckpointError
from finetune.tracking import Reporter, read_metrics
from finetune.training import setup
from finetune.training.checkpoint import checkpoint_adapter
from finetune.training.history import History
from finetune.training.resume import Resume
from finetune.training.validation import Ratio, Validator, compare


def ratio(value: float) -> Ratio:
    return Ratio(value=value, error=0.01, bands=(value,), loss=value)


def history_of(*values: float, min_improvement: float = 0.0) -> History:
    history = History(min_improvement)
    for step, value in enumerate(values, 1):
        history.add(step * 10, ratio(value))
    return history


def test_best_and_stale() -> None:
    """The lowest counts; how long ago it was is what patience compares."""
    history = history_of(0.9, 0.7, 0.8, 0.75)
    assert history.best().step == 20 and history.stale() == 2
    assert History(0.0).best() is None and History(0.0).stale() == 0


def test_better_by_too_little_is_not_better() -> None:
    """A curve that creeps would never end a run."""
    assert history_of(0.9, 0.89, 0.88, 0.79, min_improvement=0.1).best().step == 40
    assert history_of(0.9, 0.89, 0.88, 0.81, min_improvement=0.1).best().step == 10


def test_a_resume_forgets_what_lies_behind_its_step() -> None:
    """After falling back to step 20, the validation of step 30 has not happened."""
    resumed = History(0.0)
    resumed.load(history_of(0.9, 0.8, 0.5).document(), step=20)
    assert resumed.best().step == 20 and resumed.document()["best"] == 20


def test_early_stop_keeps_the_best_and_stays_stopped(document, monkeypatch) -> None:
    """Validations 0.9, 0.6, 0.7, 0.8 with patience 2: it ends after step 8 of 40, checkpoint 4 is there and named."""
    scripted = {2: 0.9, 4: 0.6, 6: 0.7, 8: 0.8}
    measured: list[int] = []
    real = History.add

    def add(self, step, value):
        measured.append(step)
        return real(self, step, value)

    monkeypatch.setattr(Validator, "measure", lambda *rest: ratio(scripted.get(2 * (len(measured) + 1), 1.0)))
    monkeypatch.setattr(History, "add", add)
    document |= {
        "text_encoder_adapter": None,
        "validation": {"every": 2, "holdout": 1, "quantiles": 2, "patience": 2},
        "checkpoint": {"every": 3, "keep": 1, "keep_best": True, "keep_every": 3},
    }
    document["train"] |= {"steps": 40, "batch_size": 1, "ema_decay": 0.5}
    run = make_run(document)
    result = train(run)
    folder = Path(document["output_dir"])
    assert result.steps == 8
    assert sorted(int(p.name[-6:]) for p in folder.glob("checkpoint-*")) == [3, 4, 6, 8]
    best = checkpoint_adapter(folder, "best")
    assert best == folder / "checkpoint-000004" / "ema.safetensors"
    assert AdapterFile.read(best).header.step == 4
    assert checkpoint_adapter(folder, "last").parent.name == "checkpoint-000008"
    assert checkpoint_adapter(folder, "3").parent.name == "checkpoint-000003"
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 3, 4, 6, 8"):
        checkpoint_adapter(folder, "5")
    before = (folder / "adapter.safetensors").read_bytes()
    assert train(run).steps == 8
    assert (folder / "adapter.safetensors").read_bytes() == before
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")][-1] == 8


@pytest.mark.parametrize(("pictures", "told"), [(2, "0.500"), (3, "0.500 +- 0.000")])
def test_two_pictures_give_no_error_estimate(pictures: int, told: str) -> None:
    """Two losses that happen to be alike would look like certainty."""
    base = torch.ones(pictures, 4)
    assert str(compare(base / 2, base)) == told


@pytest.mark.parametrize(
    ("objective", "passes"),
    [({}, 1), ({"weighting": "min_snr", "loss": "huber"}, 1), ({"density": "mode", "noise_range": (0.2, 0.8)}, 2)],
)
def test_runs_of_different_objectives_answer_one_question_too(document, objective, passes) -> None:
    """Which loss teaches better cannot be told by either's own; the plain question costs nothing where it can."""
    loop = setup.prepare(make_run(document | {"objective": objective}), Reporter(), Resume())
    asked = []
    loop.model.register_forward_hook(lambda *call: asked.append(call))
    with torch.no_grad():
        for parameter in loop.adapters.named_parameters().values():
            parameter.add_(0.02)
    own = loop.validator.measure(loop.model, loop.adapters, loop.accelerator)
    assert len(asked) == 2 * passes * len(loop.pictures.holdout), "the base and the model, each picture"
    if not objective:
        assert own.plain is None and loop.objective.plain() is None
        return
    seed = loop.run.train.seed
    plain = Validator(loop.pictures.holdout, loop.collator, loop.objective.plain(), quantiles=4, at_once=4, seed=seed)
    assert own.plain == pytest.approx(plain.measure(loop.model, loop.adapters, loop.accelerator).value, rel=1e-6)
    assert own.plain != pytest.approx(own.value, rel=1e-6)
