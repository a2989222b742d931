"""Training as the user runs it: resumed to the bit, refused in words, the same on one process or two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import load_run, make_run, train
from finetune.adapters.files import AdapterFile
from finetune.errors import CheckpointError, ConfigError, DataError, NumericError
from finetune.tracking import read_metrics
from finetune.training.loop import training_step
from tests.conftest import ROOT, command, finetune

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(folder: Path, document: dict) -> subprocess.Popen:
    """The user's command, in the background."""
    path = folder / "run.yaml"
    path.write_text(json.dumps(document))
    command = [sys.executable, "-m", "finetune", "train", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends, f"{path.name} did not appear"
        time.sleep(0.005)


def everything(folder: Path, step: int) -> dict[str, bytes]:
    """What a finished run must hold to the bit."""
    last = folder / f"checkpoint-{step:06d}"
    parts = [last / f"{name}.safetensors" for name in ("adapter", "optimizer", "ema")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [folder / "adapter.safetensors", *parts]}


def curves(folder: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_ten_steps_are_four_then_kill_then_six(document, tmp_path, optimizer):
    """Weights, optimizer, EMA, data order, draws and curves of a killed run equal those of one that was not."""
    document |= {
        "adapter": {"rank": 8, "dropout": 0.1},
        "optimizer": {"name": optimizer, "learning_rate": 1e-3, "warmup_steps": 3},
        "train": {"steps": 10, "batch_size": 3, "gradient_accumulation_steps": 2, "ema_decay": 0.9, "log_every": 1,
                  "trackers": []},
        "checkpoint": {"every": 1, "keep": 1},
    }  # fmt: skip
    document["data"] |= {"flip": True, "caption_dropout": 0.3}
    whole = document | {"output_dir": str(tmp_path / "whole")}
    train(make_run(whole))
    process = start(tmp_path, document)
    run = Path(document["output_dir"])
    wait_for(run / "checkpoint-000004", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter.safetensors").exists(), "killed too late to prove anything"
    result = train(make_run(document))
    assert result.steps == 10
    assert everything(run, 10) == everything(tmp_path / "whole", 10)
    assert curves(run) == curves(tmp_path / "whole")


def test_sigterm_saves_and_says_75(document, tmp_path):
    """A preempted machine sends SIGTERM; nothing is lost, and the exit code says that it can go on."""
    document["train"] = document["train"] | {"steps": 100000}
    document["validation"] = {"every": 0}
    document["checkpoint"] = {"every": 100000}
    process = start(tmp_path, document)
    wait_for(Path(document["output_dir"]) / "metrics.jsonl", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "The same command goes on from here" in output
    assert list(Path(document["output_dir"]).glob("checkpoint-*"))


def test_a_finished_run_is_left_as_it_is(document):
    """The same command once more trains nothing and changes no byte."""
    run = make_run(document)
    train(run)
    before = (run.output_dir / "adapter.safetensors").read_bytes()
    train(run)
    assert (run.output_dir / "adapter.safetensors").read_bytes() == before
    assert [line["step"] for line in read_metrics(run.output_dir / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_another_run_does_not_move_in(document, pictures, tmp_path):
    """Changed knobs, pictures or optimizer in a used folder are refused with the list of differences."""
    train(make_run(document))
    with pytest.raises(CheckpointError, match=r"adapter\.rank was 4 and is now 8"):
        train(make_run(document | {"adapter": {"rank": 8}}))
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate was 0\.001 and is now 0\.002"):
        train(make_run(document | {"optimizer": {"learning_rate": 2e-3}}))


def test_an_edited_caption_is_noticed(document, tmp_path):
    """Going on with other data would make the curve and the result meaningless."""
    from finetune.demo.subjects import write_subject_pictures

    folder = tmp_path / "own"
    write_subject_pictures(folder, 6)
    document["data"] = {"folder": str(folder)}
    train(make_run(document))
    (folder / "01.txt").write_text("a sks robot in the rain\n")
    (folder / "02.png").unlink()
    (folder / "02.txt").unlink()
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        train(make_run(document))
    assert "instance/01.png: a caption changed" in str(caught.value)
    assert "instance/02.png is gone" in str(caught.value)


def test_the_loss_of_a_class_picture_is_weighted(document, tmp_path):
    """prior_loss_weight multiplies a class picture's loss, and nothing else."""
    document["data"] = document["data"] | {
        "prior": {"prompts": ["a robot"], "images": 2, "inference_steps": 2, "folder": str(tmp_path / "class")}
    }
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        document["data"]["prior"]["prior_loss_weight"] = weight
        run = make_run(document | {"output_dir": str(tmp_path / f"run-{weight}"), "train": {
            "steps": 1, "batch_size": 8, "log_every": 1, "trackers": []}})  # fmt: skip
        train(run)
        losses[weight] = read_metrics(run.output_dir / "metrics.jsonl")[-1]["loss"]
    assert losses[0.0] < losses[1.0] < losses[2.0]
    assert losses[2.0] - losses[1.0] == pytest.approx(losses[1.0] - losses[0.0], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pictures(document, monkeypatch):
    """Garbage is never applied and never saved; the last checkpoint is the last good state."""
    from finetune.training import loop

    def poisoned(model, objective, batches, *rest):
        if poisoned.step == 2:
            batches[0].noise[0] = float("nan")
        poisoned.step += 1
        return training_step(model, objective, batches, *rest)

    poisoned.step = 0
    monkeypatch.setattr(loop, "training_step", poisoned)
    with pytest.raises(NumericError, match=r"(?s)Step 3 .*its pictures were .*\.png"):
        train(make_run(document))
    run = Path(document["output_dir"])
    saved = AdapterFile.read(run / "adapter.safetensors") if (run / "adapter.safetensors").exists() else None
    assert saved is None
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_weights_that_an_optimizer_spoils_are_never_saved(document, tmp_path, monkeypatch):
    """A checkpoint of NaN would be resumed for ever, and the good one before it rotated out."""
    (tmp_path / "spoiling.py").write_text(
        "import torch\n\n\nclass Late(torch.optim.SGD):\n    count = 0\n\n    def step(self, closure=None):\n"
        "        super().step(closure)\n        self.count += 1\n        if self.count == 3:\n"
        "            self.param_groups[0]['params'][0].data.fill_(float('nan'))\n"
    )
    monkeypatch.chdir(tmp_path)
    document |= {"optimizer": {"name": "spoiling.Late", "learning_rate": 1e-3}, "validation": {"every": 0}}
    document["train"] |= {"steps": 5, "log_every": 1, "gradient_accumulation_steps": 1}
    document["checkpoint"] = {"every": 1, "keep": 1}
    with pytest.raises(NumericError, match="after step 3, though every gradient was: the optimizer"):
        train(make_run(document))
    run = Path(document["output_dir"])
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert not (run / "adapter.safetensors").exists()


def test_user_errors_are_words_not_tracebacks(document, tmp_path, capsys, monkeypatch):
    """What, where, why, what to do; exit code by kind; nothing half-made."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(document))
    cases = [
        (["train", path, "--set", "adapter.rnak=3"], 2, "did you mean rank?"),
        (["train", path, "--set", "data.folder=nowhere"], 3, "data.folder=nowhere is no folder of pictures"),
        (["train", path, "--set", "data.trigger=ohwx"], 3, "does not hold the trigger"),
        (["train", path, "--set", "model.base=nowhere/nothing"], 2, "neither a folder or file here nor a hub id"),
        (["train", path, "--set", "validation.holdout=99"], 2, "leaves nothing to train on"),
        (["train", path, "--set", "adapter.targets=nonsense"], 2, "matches none of"),
        (["train", path, "--set", "model.dtype=fp16"], 2, "needs a GPU"),
        (["train", tmp_path / "missing.yaml"], 2, "There is no recipe or run at"),
        (["export", tmp_path], 2, "is a folder without run.json"),
    ]
    for arguments, code, words in cases:
        assert words in command(capsys, monkeypatch, *arguments, expect=code)
    done = finetune("train", path, "--set", "adapter.rnak=3", expect=2)
    assert "Traceback" not in done.stderr


def test_a_broken_picture_is_named_before_the_base_is_trained(document, tmp_path):
    """All bad files at once, by name."""
    from finetune.demo.subjects import write_subject_pictures

    folder = tmp_path / "own"
    write_subject_pictures(folder, 4)
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "02.png").write_bytes(b"")
    document["data"] = {"folder": str(folder)}
    with pytest.raises(DataError) as caught:
        train(make_run(document))
    assert "01.png" in str(caught.value) and "02.png" in str(caught.value)


def test_a_stop_during_validation_is_saved_too(document, monkeypatch):
    """The signal may come at any moment between two steps; "everything is saved" must be true each time."""
    from finetune.errors import StoppedOnRequest
    from finetune.training import loop

    validate = loop.validate

    def interrupted(running):
        if running.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(running)

    monkeypatch.setattr(loop, "validate", interrupted)
    document["train"] = document["train"] | {"steps": 50}
    document["checkpoint"] = {"every": 1000}
    with pytest.raises(StoppedOnRequest, match="after step 3"):
        train(make_run(document))
    assert [p.name for p in Path(document["output_dir"]).glob("checkpoint-*")] == ["checkpoint-000003"]


def test_bf16_base_with_fp32_adapter(document):
    """The base in half the memory, what is trained in full precision, on the way a GPU takes."""
    run = make_run(document | {"model": document["model"] | {"dtype": "bf16"}})
    result = train(run)
    assert next(result.components.denoiser.parameters()).dtype == torch.bfloat16
    assert {t.dtype for t in result.adapters.named_parameters().values()} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in result.adapter.tensors.values())


def test_a_moved_run_goes_on_where_it_lies(document, tmp_path, pictures):
    """From Colab to home, with the photos elsewhere: the content counts, not the folder's name."""
    document["optimizer"] = {"schedule": "constant", "learning_rate": 1e-3}
    train(make_run(document))
    shutil.move(document["output_dir"], tmp_path / "moved")
    shutil.copytree(pictures, tmp_path / "photos")
    run = load_run(tmp_path / "moved", values={"train.steps": 6, "data.folder": str(tmp_path / "photos")})
    assert run.output_dir == tmp_path / "moved"
    assert train(run).steps == 6
    assert not Path(document["output_dir"]).exists()


def test_class_pictures_of_the_user_come_first(document, tmp_path):
    """A regularisation folder without captions is fine; rendered pictures only fill it up."""
    folder = tmp_path / "class"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"mine{i}.png")
    prior = {"prompts": ["a robot"], "images": 4, "inference_steps": 2, "folder": str(folder)}
    document["data"] = document["data"] | {"prior": prior}
    run = make_run(document)
    train(run)
    checkpoint = sorted(run.output_dir.glob("checkpoint-*"))[-1]
    used = json.loads((checkpoint / "dataset.json").read_text())
    assert sorted(k for k in used if k.startswith("class/")) == [
        "class/class-00000.png", "class/mine0.png", "class/mine1.png", "class/mine2.png"
    ]  # fmt: skip
