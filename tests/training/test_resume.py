"""Going on: only with the same run, on request only, and with words for what is different about the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import make_run, train
from finetune.adapters.files import AdapterFile
from finetune.errors import CheckpointError, ResourceError, StoppedOnRequest
from finetune.tracking import MetricsLog, Reporter, read_metrics
from finetune.training import build, loop
from finetune.training.ema import ScheduleFreeMean
from finetune.training.resume import Resume
from tests.conftest import ROOT, command

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Heard(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def short(document: dict) -> dict:
    """One picture per step, no validation: for what is not about numbers."""
    document["train"] |= {"batch_size": 1, "steps": 2}
    return document | {"text_encoder_adapter": None, "validation": {"every": 0}, "checkpoint": {"every": 1}}


def test_resume_must_and_never(document, tmp_path, capsys, monkeypatch) -> None:
    """For scripts that know: code 4 where nothing is there to go on with, code 7 where the folder is used."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(short(document)))
    text = command(capsys, monkeypatch, "train", path, "--resume", "must", expect=4)
    assert "holds no checkpoint, and --resume must asks for one" in text
    train(make_run(document))
    text = command(capsys, monkeypatch, "train", path, "--resume", "never", expect=7)
    assert "is used: it holds checkpoint-" in text and "choose another output_dir" in text


def test_changed_data_and_another_machine(document, tmp_path, monkeypatch) -> None:
    """Refused with the list, accepted on request; other numerics are said, or refused on request."""
    from finetune.demo.world import write_subject_pictures

    folder = tmp_path / "own"
    write_subject_pictures(folder, 4)
    run = make_run(short(document) | {"data": {"folder": str(folder)}})
    train(run)
    (folder / "01.txt").write_text("a sks robot in the rain\n")
    with pytest.raises(CheckpointError, match=r"(?s)or give --accept-data-change.*01\.png: a caption changed"):
        train(run)
    heard = Heard()
    numerics = build.numerics(torch.device("cpu")) | {"threads": 99}
    monkeypatch.setattr(build, "numerics", lambda device: numerics)
    train(run, heard, Resume(accept_data_change=True))
    assert any("The pictures have changed, as accepted: " in text for text in heard.warnings)
    assert any("threads was" in text and "not to the bit" in text for text in heard.warnings)
    with pytest.raises(CheckpointError, match="the numerics: threads was"):
        train(run, how=Resume(accept_data_change=True, strict_numerics=True))


def test_damage_is_told_with_the_steps_that_are_done_again(document) -> None:
    """The newest whole checkpoint is used, and nobody wonders why the step count went back."""
    document = short(document)
    document["train"]["steps"] = 3
    run = make_run(document | {"checkpoint": {"every": 1, "keep": 3}})
    train(run)
    for step in (2, 3):
        path = run.output_dir / f"checkpoint-{step:06d}" / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    heard = Heard()
    train(run, heard)
    text = "\n".join(heard.warnings)
    assert "checkpoint-000003/optimizer.safetensors is damaged" in text
    assert "checkpoint-000001 is the newest whole one: 2 steps are done again." in text


def test_a_start_that_was_killed_before_its_first_checkpoint_leaves_no_lines(tmp_path: Path) -> None:
    """Found by the kill campaign: step 0 stood twice in the log."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.write(0, {"validation/ratio": 1.0})
    MetricsLog(path, -1).write(0, {"validation/ratio": 1.0})
    assert [line["step"] for line in read_metrics(path)] == [0]


def test_full_memory_says_what_to_lower_and_leaves_checkpoints(document, monkeypatch) -> None:
    """Code 9; the last checkpoint is whole."""
    real, done = loop.training_step, 0

    def full(*arguments):
        nonlocal done
        done += 1
        if done == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return real(*arguments)

    monkeypatch.setattr(loop, "training_step", full)
    run = make_run(short(document))
    with pytest.raises(ResourceError) as caught:
        train(run)
    assert caught.value.exit_code == 9
    assert "Tried to allocate 2.00 GiB" in str(caught.value) and "lower train.batch_size" in str(caught.value)
    assert [p.name for p in run.output_dir.glob("checkpoint-*")] == ["checkpoint-000001"]


def test_a_schedule_free_run_exports_its_mean_and_resumes_to_the_bit(document) -> None:
    """The parameters train at one point and are judged and exported at another, the library's own."""
    document = short(document)
    document["optimizer"] = {"name": "schedulefree_adamw", "schedule": "constant", "learning_rate": 1e-2}
    document["train"]["steps"] = 4
    whole = train(make_run(document))
    resumed = document | {"output_dir": document["output_dir"] + "-resumed"}
    real, done = loop.save, 0

    def stop_after_two(running) -> None:
        nonlocal done
        real(running)
        done += 1
        if done == 2:
            raise StoppedOnRequest("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedOnRequest):
        patch.setattr(loop, "save", stop_after_two)
        train(make_run(resumed))
    again = train(make_run(resumed))
    assert all(torch.equal(tensor, again.adapter.tensors[name]) for name, tensor in whole.adapter.tensors.items())
    last = Path(document["output_dir"]) / "checkpoint-000004"
    trained = AdapterFile.read(last / "adapter.safetensors").tensors
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in whole.adapter.tensors.items())


def test_the_schedule_free_mean_is_the_librarys() -> None:
    """What its own eval() would put in place."""
    import schedulefree

    parameter = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    optimizer = schedulefree.AdamWScheduleFree([parameter], lr=0.1)
    optimizer.train()
    mean = ScheduleFreeMean({"a": parameter}, optimizer)
    assert torch.equal(mean.state()["a"], parameter)
    for step in range(3):
        parameter.grad = torch.full((5,), 1.0 + step)
        optimizer.step()
    ours, before = mean.state()["a"], parameter.detach().clone()
    with mean.swapped():
        assert torch.equal(parameter, ours)
    assert torch.equal(parameter, before)
    optimizer.eval()
    torch.testing.assert_close(parameter.detach(), ours, rtol=0, atol=0)


def test_one_process_two_processes_and_a_change_between_them_train_the_same(document, tmp_path) -> None:
    """Draws belong to samples. Begun by one process and finished by two with half the batch each, a run ends where one
    process does, within what the order of a sum of floats can do: 1e-5 of the loss, 1e-4 of the largest change
    (measured: 2e-6 and 5e-6).

    The teacher, gradient checkpointing and accumulation are on, for each needs care under DDP.
    """
    document |= {
        "text_encoder_adapter": None,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "objective": {"teacher": {"prompts": ["a robot"], "every": 2}},
        "train": {"steps": 5, "batch_size": 4, "gradient_accumulation_steps": 2, "log_every": 1, "trackers": []},
        "checkpoint": {"every": 1},
    }
    document["data"] |= {"cache_folder": str(tmp_path / "cache")}
    train(make_run(document | {"output_dir": str(tmp_path / "one")}))
    two = document | {"output_dir": str(tmp_path / "two"), "export": {"formats": []}}
    real, done = loop.save, 0

    def stop_after_two(running) -> None:
        nonlocal done
        real(running)
        done += 1
        if done == 2:
            raise StoppedOnRequest("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedOnRequest):
        patch.setattr(loop, "save", stop_after_two)
        train(make_run(two))
    two["train"] = two["train"] | {"batch_size": 2}
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(two))
    # keep: on CPUs `accelerate launch` starts several processes through MPI only; torch's own launcher needs none.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "finetune", "train", str(path)]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    done_by_two = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done_by_two.returncode == 0, done_by_two.stdout + done_by_two.stderr
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        for key in {"loss", "teacher_loss", "grad_norm", "validation/ratio"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
    one, other = (AdapterFile.read(tmp_path / name / "adapter.safetensors").tensors for name in ("one", "two"))
    moved = max(float(one[name].abs().max()) for name in one if name.endswith("lora_B.weight"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=moved * 1e-4), name
