"""What can be known early is said early: paths, room, leftovers, launchers, and a plan with figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.import_utils import is_torchao_available
from torch import nn

from finetune import make_run
from finetune.config import OptimizerConfig
from finetune.errors import ConfigError, StorageError
from finetune.training import build, checkpoint, preflight, trackers
from finetune.training.memory import optimizer_bytes, predict, step_bytes
from finetune.training.optimizer_state import state_bytes
from finetune.training.optimizers import build_optimizer
from tests.conftest import command


def test_only_our_own_leftovers_are_swept(tmp_path: Path) -> None:
    """Half-written files of killed starts go; whatever else lies there stays, and so does the only copy of anything."""
    ours = [".adapter.safetensors.part-12-0a1b2c3d", ".checkpoint-000004.part-7-00000000", ".checkpoint-000001.old-7"]
    others = [".part-1", "notes.part-12", ".lock", ".exports.old-9-0a1b2c3d", ".x.part-1-zzzzzzzz", "metrics.jsonl"]
    for name in (*ours, *others):
        (tmp_path / name).mkdir() if "." not in name[1:] or "checkpoint" in name or "exports" in name else (
            tmp_path / name
        ).write_text("x")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".step-000000.png.part-3-ffffffff").write_text("x")
    removed = preflight.sweep(tmp_path)
    assert sorted(path.name for path in removed) == sorted([*ours, ".step-000000.png.part-3-ffffffff"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "samples"])


def test_no_room_for_the_first_checkpoint_is_said_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    """Hours of training that cannot be saved are hours lost."""
    parameters = {"unet.a": nn.Parameter(torch.zeros(1_000_000))}
    run = SimpleNamespace(output_dir=tmp_path, train=SimpleNamespace(ema_decay=0.9))
    adapters = SimpleNamespace(named_parameters=lambda: parameters)
    preflight.check_disk(run, adapters)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=16_000_000))
    with pytest.raises(StorageError, match=r"the first checkpoint needs 16\.3 MiB, 15\.3 MiB are free"):
        preflight.check_disk(run, adapters)


def test_a_torchao_that_peft_refuses_is_said_before_the_base_is_loaded(document, tmp_path: Path, monkeypatch) -> None:
    """Colab and old images bring one; nothing here uses it, and PEFT would stop at the first layer."""
    (tmp_path / "old" / "torchao-0.10.0.dist-info").mkdir(parents=True)
    (tmp_path / "old" / "torchao-0.10.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.10.0\n")
    (tmp_path / "old" / "torchao.py").touch()
    run = make_run(document)
    preflight.check(run)
    is_torchao_available.cache_clear()
    with monkeypatch.context() as old:
        old.syspath_prepend(tmp_path / "old")
        with pytest.raises(ConfigError, match=r"version 0\.10\.0.*Nothing here needs torchao: `pip uninstall torchao`"):
            preflight.check(run)
    is_torchao_available.cache_clear()
    preflight.check(run)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch) -> None:
    """Each would train the whole run and write it into the same folder; so it is on Apple's GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(build, "Accelerator", lambda **settings: SimpleNamespace(num_processes=1))
    with pytest.raises(ConfigError, match="2 processes were started, but accelerate sees 1"):
        build.build_accelerator("fp32", ())


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, True),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True", "PMI_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
    ],
)
def test_a_launcher_that_started_one_process_of_several_is_told(monkeypatch, variables: dict[str, str], told) -> None:
    """`accelerate launch --cpu --num_processes 2` without MPI: half the batch, and nobody would know."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(build.launch_warnings()) is told


def test_a_base_in_pieces_is_refused_what_it_cannot_do(document, monkeypatch) -> None:
    """Before anything is loaded, all at once, each with the remedy."""
    document |= {"model": document["model"] | {"storage": "nf4"}, "samples": {"prompts": ["a sks dog"]}}
    preflight.check(make_run(document))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError) as caught:
        preflight.check(make_run(document))
    text = str(caught.value)
    assert "FSDP version 1" in text and "--fsdp_version 2" in text
    assert "model.storage=nf4" in text and "set samples.prompts=[]" in text
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError) as caught:
        preflight.check(make_run(document))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(("variable", "name"), build.REFUSED.items())
def test_sharded_training_is_refused_with_its_reason(monkeypatch, variable: str, name: str) -> None:
    """DeepSpeed leaves no names to save by; a run that could not be resumed must not begin."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError) as caught:
        build.build_accelerator("fp16", ("wandb",))
    text = str(caught.value)
    assert name in text and "--multi_gpu" in text
    assert "needs a GPU" in text and "pip install wandb" in text, "all problems come at once"


def net(checkpointing: bool = False) -> nn.Module:
    """Eight frozen layers of width 256 with one trained factor each."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(256, 256).requires_grad_(False)
            self.down, self.up = nn.Linear(256, 4, bias=False), nn.Linear(4, 256, bias=False)

        def forward(self, x):
            return torch.nn.functional.gelu(self.base(x) + self.up(self.down(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(8))

        def forward(self, x):
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
            return x

    return Net()


def loss_of(rows: int):
    return lambda model: model(torch.empty(rows, 256, device="meta")).mean()


def test_step_memory_is_what_arithmetic_says() -> None:
    """Each block keeps its inner sum (for gelu) and its input (for the trained factor) until the backward pass."""
    kept = 8 * 2 * 1000 * 256 * 4
    found = step_bytes(net(), loss_of(1000))
    assert kept < found < 1.5 * kept
    assert step_bytes(net(), loss_of(4000)) == pytest.approx(4 * found, rel=0.02)
    assert step_bytes(net(checkpointing=True), loss_of(1000)) < 0.75 * found


def test_prediction_leaves_the_model_alone_and_counts_by_part() -> None:
    """Weights, what is trained, optimizer state: to the byte."""
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = predict(model, loss_of(10), OptimizerConfig(name="adamw"), mean=True)
    trained = 8 * 2 * 4 * 256
    assert memory.trained == memory.mean == 4 * trained
    assert memory.weights == 4 * 8 * (256 * 256 + 256)
    assert memory.optimizer == 8 * trained + 4 * 16  # two moments and one step counter per tensor
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "adafactor", "came"])
def test_predicted_optimizer_state_is_what_it_really_holds(name: str) -> None:
    """8-bit is 8-bit only in large tensors, Adafactor keeps rows and columns: no formula, one real step."""
    shapes = [(64, 64), (64, 64), (8, 8), (3, 40, 3, 3)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    config = OptimizerConfig(name=name)
    built = build_optimizer(config, [{"params": parameters, "lr": 1e-3, "name": "x"}], torch.device("cpu"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    built.optimizer.step()
    real = sum(state_bytes(built.optimizer).values())
    # keep: two code books of 1 kB are shared within an optimizer and counted once per shape here.
    assert real <= optimizer_bytes(config, shapes) <= real + 2048 * len(set(shapes))


def test_the_plan_says_what_a_run_will_take_and_leaves_nothing(document, tmp_path, capsys, monkeypatch) -> None:
    """Steps, epochs, parameters, memory, disk; not a file is written."""
    document["objective"] = {"teacher": {"prompts": ["a robot"]}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(document))
    before = sorted(os.listdir(tmp_path))
    text = command(capsys, monkeypatch, "plan", path)
    for words in (
        "Base model tiny (sd1), fp32 on cpu", "8 pictures, 2 held out", "the base as teacher, weight 1, asked every 2",
        "Steps 4, up to 4 pictures each", "Base, frozen", "Optimizer state", "Activations and gradients", "Together",
        "Encoding, before",
        "2 of", "at most, and one more while it is written", "--measure 5",
    ):  # fmt: skip
        assert words in text, words
    assert sorted(os.listdir(tmp_path)) == before
    missing = command(capsys, monkeypatch, "plan", path, "--set", "data.folder=nowhere", expect=3)
    assert "data.folder=nowhere is no folder of pictures" in missing


def test_the_plan_can_measure_time(document, tmp_path, capsys, monkeypatch) -> None:
    """Real steps that are thrown away; the encoded pictures stay, for the training to come."""
    document |= {"text_encoder_adapter": None, "validation": {"every": 0}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(document))
    text = command(capsys, monkeypatch, "plan", path, "--measure", 1)
    assert "the median of 1" in text and "for 4, without validation and samples" in text
    assert {p.name for p in Path(document["output_dir"]).iterdir()} == {".lock", "cache"}
