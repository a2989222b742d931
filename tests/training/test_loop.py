"""The loop as a whole: what it uses of the machine, and what reaches the log."""

from __future__ import annotations

import psutil

from finetune import make_run, train
from finetune.tracking import read_metrics
from finetune.training import loop


def test_training_starts_no_process(document, monkeypatch) -> None:
    """No data workers to be killed, no shared memory to run out of: batches are made here, from the cache."""
    real, seen = loop.training_step, []

    def looking(*arguments):
        seen.append(len(psutil.Process().children(recursive=True)))
        return real(*arguments)

    before = len(psutil.Process().children(recursive=True))
    monkeypatch.setattr(loop, "training_step", looking)
    document |= {"text_encoder_adapter": None, "validation": {"every": 0}}
    document["train"] |= {"steps": 2, "batch_size": 1}
    train(make_run(document))
    assert seen == [before, before]


def test_noise_of_every_kind_reaches_the_training_and_not_the_validation(document) -> None:
    """Offset noise and input perturbation change the first step's loss; the questions of validation stay the same."""
    objective = {"loss": "huber", "huber_schedule": "snr", "weighting": "soft_min_snr"}
    shaped = {"noise_offset": 0.1, "input_perturbation": 0.1}
    document |= {"text_encoder_adapter": None}
    document["train"] |= {"steps": 2, "batch_size": 2}
    lines = []
    for name, asked in (("plain", objective), ("shaped", objective | shaped)):
        run = make_run(document | {"objective": asked, "output_dir": f"{document['output_dir']}-{name}"})
        train(run)
        lines.append(read_metrics(run.output_dir / "metrics.jsonl"))
    plain, noisy = lines
    assert plain[0]["validation/loss"] == noisy[0]["validation/loss"]
    assert plain[1]["loss"] != noisy[1]["loss"]
