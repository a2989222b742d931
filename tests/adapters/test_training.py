"""Every method trains through the user's command, and goes on after a kill as if there had been none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune import make_run, train
from finetune.adapters import METHODS, AdapterFile
from finetune.demo.scenes import Scene, draw
from finetune.errors import CheckpointError, ConfigError
from finetune.interchange.commands import convert_adapter
from finetune.run_files import dump_run
from tests.conftest import command

WORD = "<bot>"


@pytest.fixture
def small(document) -> dict:
    """A run of four steps with EMA and a checkpoint every two; nothing is exported."""
    return document | {
        "train": {"steps": 4, "batch_size": 2, "log_every": 4, "trackers": [], "ema_decay": 0.5},
        "validation": {"every": 4, "holdout": 1, "quantiles": 2},
        "checkpoint": {"every": 2, "keep": 9},
        "export": {"formats": []},
    }


def kept(folder: Path) -> dict[str, bytes]:
    """What must not differ by a bit."""
    last = folder / "checkpoint-000004"
    paths = [folder / "adapter.safetensors", *sorted(last.glob("*.safetensors"))]
    return {path.name: path.read_bytes() for path in paths} | {"n": bytes(len(paths))}


KILLED = {
    "lora, its own rates and ranks": {
        "adapter": {"rank": 4, "conv_rank": 2, "targets": "all", "lora_plus_ratio": 4,
                    "blocks": [{"pattern": "mid_block", "rank": 2, "learning_rate": 1e-4}]},
        "text_encoder_adapter": {"rank": 2, "per_encoder": {"text_encoder": {"rank": 3, "learning_rate": 1e-4}}},
    },
    "text encoder stops half-way": {"text_encoder_adapter": {"rank": 4, "train_share": 0.5}},
    "dora": {"adapter": {"method": "dora", "rank": 4, "dropout": 0.1}, "text_encoder_adapter": None},
    "lokr": {"adapter": {"method": "lokr", "rank": 2, "dropout": 0.1, "targets": "all"}, "text_encoder_adapter": None},
    "loha": {"adapter": {"method": "loha", "rank": 2, "dropout": 0.1}, "text_encoder_adapter": None},
    "pissa": {"adapter": {"rank": 4, "init": "pissa"}, "text_encoder_adapter": None},
    "full": {"adapter": {"method": "full"}, "text_encoder_adapter": {"method": "full"}},
    "words": {"adapter": None, "text_encoder_adapter": None, "tokens": {"words": {WORD: "toy cat"}}},
    "words and lora": {
        "adapter": {"rank": 4},
        "text_encoder_adapter": {"rank": 4},
        "tokens": {"words": {WORD: "toy cat", "<cat>": "cat"}, "vectors": 2, "train_share": 0.5, "norm_pull": 0.1},
    },
}  # fmt: skip


LESS_TOLD = {"loha", "pissa"}
"""What the others tell as well, but for tests of their own without a run."""


@pytest.mark.parametrize(
    "change",
    [pytest.param(c, id=name, marks=[pytest.mark.slow] if name in LESS_TOLD else []) for name, c in KILLED.items()],
)
@pytest.mark.parametrize("optimizer", ["adamw8bit", pytest.param("adamw", marks=pytest.mark.slow)])
def test_four_steps_are_two_and_two(small, change, optimizer, tmp_path):
    """Parameters, running mean and optimizer state after a resume equal those of a run that was never stopped."""
    small |= {**change, "optimizer": {"name": optimizer, "learning_rate": 1e-3}}
    if "tokens" in change:
        small["data"] = small["data"] | {"trigger": None, "captions": "template", "caption_template": f"a {WORD} <cat>"}
    whole = tmp_path / "run"
    train(make_run(small))
    halved = tmp_path / "halved"
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoint-000004")
    (halved / "adapter.safetensors").unlink()
    train(make_run(small | {"output_dir": str(halved)}))
    assert kept(halved) == kept(whole)
    moved = AdapterFile.read(whole / "checkpoint-000002" / "adapter.safetensors")
    assert AdapterFile.read(whole / "checkpoint-000004" / "adapter.safetensors").tensors.keys() == moved.tensors.keys()


def test_a_text_encoder_that_stopped_does_not_drift(small, tmp_path):
    """Neither weights nor optimizer state of what rests may change; the denoiser goes on."""
    train(make_run(small | {"text_encoder_adapter": {"rank": 4, "train_share": 0.5}}))
    for name in ("adapter", "optimizer"):
        then, now = (
            read(tmp_path / "run" / f"checkpoint-00000{step}" / f"{name}.safetensors") for step in (2, 4)
        )
        rest = [key for key in then if key.startswith("text_encoder")]
        assert rest and all(torch.equal(then[key], now[key]) for key in rest)
        assert not all(torch.equal(then[key], now[key]) for key in then)


def read(path: Path) -> dict[str, torch.Tensor]:
    from finetune.storage import read_safetensors

    return read_safetensors(path)[0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_command_trains_every_method(small, tmp_path, capsys, monkeypatch, method):
    """From the configuration to a file that says what it is."""
    size = {} if method in ("ia3", "full") else {"rank": 4}
    small |= {"adapter": {"method": method, **size}, "text_encoder_adapter": None}
    small["train"] = small["train"] | {"steps": 2}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(small))
    printed = command(capsys, monkeypatch, "train", path)
    assert f"{method} rank" in printed or method in ("ia3", "oft", "boft", "full")
    file = AdapterFile.read(tmp_path / "run" / "adapter.safetensors")
    assert file.header.method == {"unet": method}
    assert len(file.layers()) > 10


def test_it_goes_on_from_a_file_and_on_top_of_merged_ones(small, tmp_path):
    """start_from gives the file's tensors; merge_first another base, so that nothing is mixed up."""
    small |= {"text_encoder_adapter": None, "train": small["train"] | {"steps": 2}}
    first = train(make_run(small | {"output_dir": str(tmp_path / "first")})).adapter
    path = tmp_path / "first" / "adapter.safetensors"
    still = {"name": "adamw", "learning_rate": 1e-12, "weight_decay": 0.0}
    again = {"rank": 4, "start_from": str(path)}
    second = train(make_run(small | {"adapter": again, "optimizer": still, "output_dir": str(tmp_path / "second")}))
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.adapter.tensors[name], tensor, rtol=0, atol=1e-6)
    on_top = {"rank": 4, "merge_first": [f"{path}@0.5"]}
    third = train(make_run(small | {"adapter": on_top, "output_dir": str(tmp_path / "third")}))
    assert third.adapter.header.base_digest != first.header.base_digest
    assert third.adapter.header.options["merged_first"][0]["weight"] == 0.5
    train(make_run(small | {"adapter": on_top, "output_dir": str(tmp_path / "third")}))
    with pytest.raises(CheckpointError, match="merge_first"):
        other = {"rank": 4, "merge_first": [str(path)]}
        train(make_run(small | {"adapter": other, "output_dir": str(tmp_path / "third")}))


def test_it_goes_on_from_and_merges_files_of_other_programs(small, tmp_path):
    """Most adapters that people have are kohya files; the same tensors must come out of one."""
    small |= {"text_encoder_adapter": None, "train": small["train"] | {"steps": 2}}
    first = train(make_run(small | {"output_dir": str(tmp_path / "first")})).adapter
    kohya = tmp_path / "kohya.safetensors"
    base = Path(small["model"]["base"])
    convert_adapter(tmp_path / "first" / "adapter.safetensors", kohya, to="kohya", dtype="fp32", base=base)
    still = {"name": "adamw", "learning_rate": 1e-12, "weight_decay": 0.0}
    again = {"rank": 4, "start_from": str(kohya)}
    second = train(make_run(small | {"adapter": again, "optimizer": still, "output_dir": str(tmp_path / "second")}))
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.adapter.tensors[name], tensor, rtol=0, atol=1e-6)
    on_top = {"rank": 4, "merge_first": [f"{kohya}@0.5"]}
    third = train(make_run(small | {"adapter": on_top, "output_dir": str(tmp_path / "third")}))
    assert third.adapter.header.options["merged_first"][0]["file"] == "kohya.safetensors"


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"rank": 8}, "set the same rank"),
        ({"rank": 4, "alpha": 1.0}, "the file's strength is 1, this run's 0.25; set alpha"),
        ({"rank": 4, "targets": "attention+mlp"}, "is trained by this run, but not in the file"),
        ({"rank": 4, "method": "dora"}, "the file's method is lora, this run's dora"),
    ],
)
def test_a_file_that_does_not_fit_is_not_gone_on_from(small, tmp_path, adapter, expected):
    """Tensors put where they mean something else would train from nonsense."""
    small |= {"text_encoder_adapter": None, "train": small["train"] | {"steps": 1, "ema_decay": None}}
    train(make_run(small | {"output_dir": str(tmp_path / "first")}))
    start = {"start_from": str(tmp_path / "first" / "adapter.safetensors")}
    with pytest.raises(CheckpointError, match=expected):
        train(make_run(small | {"adapter": adapter | start, "output_dir": str(tmp_path / "second")}))


def test_a_run_that_trains_nothing_is_refused(small):
    """It would only warm the room."""
    with pytest.raises(ConfigError, match="nothing would be trained"):
        make_run(small | {"adapter": None, "text_encoder_adapter": None})


def test_steps_may_not_change_under_a_share_of_them(small):
    """The text encoder would stop elsewhere, and the resumed run be another."""
    from finetune.config import differences

    constant = small | {"optimizer": {"schedule": "constant"}}
    longer = constant | {"train": constant["train"] | {"steps": 9}}
    assert differences(make_run(constant), make_run(longer)) == []
    share = {"text_encoder_adapter": {"rank": 4, "train_share": 0.5}}
    assert differences(make_run(constant | share), make_run(longer | share))
    assert dump_run(make_run(constant | share))["text_encoder_adapter"]["train_share"] == 0.5


@pytest.mark.slow
def test_textual_inversion_learns_its_word(tmp_path):
    """One vector that starts as a star learns from eight pictures of purple mushrooms, on the embedded base.

    Held-out mushrooms are denoised better with the word as learned than as it began, by far more than the error.
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        scene = Scene("mushroom", "purple", "white", shift=(i % 4 - 1.5, i // 4 - 1.0), stretch=0.94 + i / 100)
        draw(scene).save(folder / f"{i:02d}.png")
    run = make_run({
        "model": {"base": "demo"},
        "data": {"folder": str(folder), "captions": "template", "caption_template": f"a {WORD} on a white background"},
        "adapter": None,
        "tokens": {"words": {WORD: "star"}, "learning_rate": 0.03},
        "optimizer": {"name": "adamw", "schedule": "constant", "weight_decay": 0.0},
        "train": {"steps": 60, "batch_size": 4, "log_every": 20, "trackers": [], "gradient_checkpointing": False},
        "validation": {"every": 60, "holdout": 4, "quantiles": 8},
        "checkpoint": {"every": 60},
        "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    ratio = train(run).validation
    assert ratio.value + 3 * ratio.error < 0.85


def test_a_misspelt_field_of_a_block_is_answered_with_the_right_one(small):
    """Fields inside lists and mappings deserve the same help as others."""
    adapter = {"blocks": [{"patern": "mid_block"}]}
    text = {"per_encoder": {"text_encoder": {"rnak": 4}}}
    with pytest.raises(ConfigError) as caught:
        make_run(small | {"adapter": adapter, "text_encoder_adapter": text})
    assert "adapter.blocks.0.patern: there is no such field (did you mean pattern?)" in caught.value.text()
    assert "per_encoder.text_encoder.rnak: there is no such field (did you mean" in caught.value.text()
