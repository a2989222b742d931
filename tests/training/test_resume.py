"""Going on: only with the same run, on request only, and with words for what is different about the machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from PIL import Image, ImageOps

from finetune import make_run, train
from finetune.adapters.files import AdapterFile
from finetune.data import prior as prior_module
from finetune.errors import CheckpointError, ResourceError, StoppedOnRequest
from finetune.run_files import dump_run
from finetune.sampling.generate import generate
from finetune.tracking import MetricsLog, Reporter, read_metrics
from finetune.training import build, loop
from finetune.training.ema import ScheduleFreeMean
from finetune.training.resume import Resume, refuse_other
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
    from finetune.demo.subjects import write_subject_pictures

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


def test_validation_pictures_may_move_but_not_change(document, tmp_path) -> None:
    """They decide about early stopping and the best checkpoint, so their content is compared, and not their folder."""
    from finetune.demo.subjects import write_subject_pictures

    write_subject_pictures(tmp_path / "training", 4)
    write_subject_pictures(tmp_path / "judged", 2, seed=5)
    document = short(document) | {"data": {"folder": str(tmp_path / "training")}, "optimizer": {"schedule": "constant"}}
    train(make_run(document | {"validation": {"every": 2, "folder": str(tmp_path / "judged")}}))
    (tmp_path / "judged").rename(tmp_path / "elsewhere")
    document["train"]["steps"] = 3
    moved = document | {"validation": {"every": 2, "folder": str(tmp_path / "elsewhere")}}
    assert train(make_run(moved)).steps == 3
    (tmp_path / "elsewhere" / "01.txt").write_text("a sks robot in the rain\n")
    with pytest.raises(CheckpointError, match=r"held out: .*01\.png: a caption changed"):
        train(make_run(moved))


def test_class_pictures_drawn_again_are_the_same_ones(document, tmp_path, monkeypatch) -> None:
    """A disconnect loses them, the next GPU draws other last bits; only a picture that somebody edited is another."""
    folder = tmp_path / "class"
    prior = {"prompts": ["a robot"], "images": 2, "inference_steps": 2, "folder": str(folder)}
    document = short(document)
    run = make_run(document | {"data": document["data"] | {"prior": prior}})
    train(run)
    before = (folder / "class-00000.png").read_bytes()
    rmtree(folder)
    with monkeypatch.context() as other_gpu:
        other_gpu.setattr(prior_module, "generate", lambda *args, **named: map(one_bit_off, generate(*args, **named)))
        assert train(run).steps == 2
    drawn = folder / "class-00000.png"
    assert drawn.read_bytes() != before
    ImageOps.mirror(Image.open(drawn)).save(drawn)
    with pytest.raises(CheckpointError, match=r"(?s)Resume\(accept_data_change=True\).*class-00000\.png: the picture"):
        train(run)


def one_bit_off(picture: Image.Image) -> Image.Image:
    """The same picture as another machine computes it."""
    red, green, blue = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red ^ 1, green, blue))
    return picture


def test_a_run_with_an_own_loss_goes_on_only_with_the_same_code(document, tmp_path, monkeypatch) -> None:
    """The name alone says nothing about what it computes."""
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "own_loss_of_a_resumed_run.py"
    code.write_text("def cubed(prediction, target, delta):\n    return (prediction - target).abs() ** 3\n")
    run = make_run(short(document) | {"objective": {"loss": "own_loss_of_a_resumed_run.cubed"}})
    train(run)
    assert train(run).steps == 2
    code.write_text(code.read_text().replace("** 3", "** 4"))
    with pytest.raises(CheckpointError, match=r"your own code: objective\.loss was"):
        train(run)


@pytest.mark.parametrize(("schedule", "told"), [("constant", False), ("cosine", True)])
def test_more_steps_are_blamed_only_where_the_schedule_forbids_them(document, schedule, told) -> None:
    """A constant rate may go on for longer; there the advice to begin another run is wrong."""
    before = make_run(document | {"optimizer": {"schedule": schedule, "learning_rate": 1e-3}})
    longer = document["train"] | {"steps": 9}
    after = make_run(document | {"optimizer": {"schedule": schedule, "learning_rate": 1e-4}, "train": longer})
    with pytest.raises(CheckpointError) as caught:
        refuse_other("checkpoint-000004", dump_run(before), after)
    assert "learning_rate was 0.001" in str(caught.value)
    assert ("to train longer" in str(caught.value)) == told


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


@pytest.mark.parametrize(
    "launcher", ["--multi_gpu", pytest.param("--use_fsdp --fsdp_version 2", marks=pytest.mark.slow)]
)
def test_one_process_two_processes_and_a_change_between_them_train_the_same(document, tmp_path, launcher) -> None:
    """Draws belong to samples. Begun by one process and finished by two with half the batch each, a run ends where one
    process does, within what the order of a sum of floats can do: 1e-5 of the loss, 1e-4 of the largest change
    (measured: 2e-6 and 5e-6).

    The teacher, gradient checkpointing and accumulation are on, for each needs care under DDP. With FSDP the base lies
    in pieces, and a trained text encoder's adapters and the constants of pissa stay whole.
    """
    split = "fsdp" in launcher
    document |= {
        "text_encoder_adapter": {"rank": 4} if split else None,
        "adapter": {"rank": 4, "init": "pissa" if split else "default"},
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
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "finetune", "train", str(path)]
    done_by_two = subprocess.run(launch, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done_by_two.returncode == 0, done_by_two.stdout + done_by_two.stderr
    pieces = re.search(r"lies in 2 pieces of ([\d.]+) MiB", done_by_two.stdout)
    assert bool(pieces) is split
    if pieces:
        networks = [Path(document["model"]["base"]) / name for name in ("unet", "text_encoder")]
        stored = sum(path.stat().st_size for network in networks for path in network.glob("*.safetensors"))
        assert float(pieces[1]) == pytest.approx(stored / 2 / 2**20, rel=0.1)
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        for key in {"loss", "teacher_loss", "grad_norm", "validation/ratio"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
    judged = [json.loads((tmp_path / n / "checkpoint-000005" / "meter.json").read_text()) for n in ("one", "two")]
    for alone, together in zip(*(document["usual"] for document in judged), strict=True):
        assert together == pytest.approx(alone, rel=1e-5), "both judge all pictures, in one order"
    one, other = (AdapterFile.read(tmp_path / name / "adapter.safetensors").tensors for name in ("one", "two"))
    moved = max(float(one[name].abs().max()) for name in one if name.endswith("lora_B.weight"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=moved * 1e-4), name
