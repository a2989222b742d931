"""`finetune build`: the command a CI job calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline

from finetune import build_artifact, make_run
from finetune.artifact import _check_gate
from finetune.errors import ConfigError, NumericError
from finetune.export.manifest import check_manifest
from finetune.training.validation import Ratio
from tests.conftest import command


def test_build_makes_an_artifact_that_proves_itself(document, tmp_path, capsys, monkeypatch):
    """Files that load elsewhere, a card, the score, and hashes of everything; a repeated job trains nothing anew."""
    document["export"] = {"formats": ["diffusers", "kohya"], "name": "sks-robot"}
    document["samples"] = {"prompts": ["a sks robot"], "per_prompt": 1, "inference_steps": 2}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(document))
    dist = tmp_path / "dist"
    text = command(capsys, monkeypatch, "build", path, "-o", dist, "--max-ratio", "1.5")
    assert "Files and hashes" in text
    names = {p.relative_to(dist).as_posix() for p in dist.rglob("*") if p.is_file()}
    assert {
        "pytorch_lora_weights.safetensors", "sks-robot.safetensors", "sks-robot.json", "sks-robot.png", "README.md",
        "score.json", "run.json",
        "metrics.jsonl", "manifest.json", "images/000-0.png", "images/before-after.png",
    } == names  # fmt: skip
    assert check_manifest(dist) == []
    score = json.loads((dist / "score.json").read_text())
    assert score["steps"] == 4 and 0 < score["loss_over_base"] < 1.5
    assert score["exports"].keys() == {"diffusers", "kohya"}
    metrics = [json.loads(line) for line in (dist / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in metrics)
    assert not any("seconds_per_step" in line for line in metrics), "two builds must have the same bytes"
    card = (dist / "README.md").read_text()
    assert "on 2 held-out pictures" in card and "8 of the subject" in card and "No licence is stated" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["widget"] == [{"text": "a sks robot", "output": {"url": "images/000-0.png"}}]
    assert header["instance_prompt"] == "sks"
    assert "images/000-0.png" in json.loads((dist / "manifest.json").read_text())["files"]
    assert "images/000-0.png" in command(capsys, monkeypatch, "push", dist, "me/robot", "--dry-run")
    pipe = StableDiffusionPipeline.from_pretrained(document["model"]["base"], safety_checker=None)
    pipe.load_lora_weights(dist)
    assert pipe.get_active_adapters()


def test_an_artifact_tells_nothing_of_the_machine(document, tmp_path):
    """Folders, user names and hosts have no business in a file that is published."""
    document["samples"] = {"prompts": ["a sks robot"], "per_prompt": 1, "inference_steps": 2}
    build_artifact(make_run(document), tmp_path / "dist", 1.5)
    for file in (tmp_path / "dist").rglob("*"):
        if file.is_file():
            assert str(tmp_path.parent).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("value", "error", "limit", "passes"),
    [
        (0.97, 0.03, None, False),
        (0.96, 0.03, None, True),
        (0.9996, None, None, True),
        (1.0, None, None, False),
        (1.0, 0.0, 1.0, True),
        (1.0003, 0.002, 1.0, False),
        (float("nan"), 0.1, None, False),
    ],
)
def test_a_gate_is_passed_only_by_what_differs_from_the_base(tmp_path, value, error, limit, passes):
    """0.97 +- 0.03 is what an adapter that learned nothing gets every other time."""
    found = Ratio(value, error, (value,), 0.1)
    if passes:
        _check_gate(found, limit, "5 held-out pictures", tmp_path)
        return
    with pytest.raises(NumericError) as caught:
        _check_gate(found, limit, "5 held-out pictures", tmp_path)
    assert f"{value:.6g}" in str(caught.value) and ("at most 1" in str(caught.value)) == (limit is not None)


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_gate_that_is_no_number_is_refused_before_training(document, tmp_path, limit):
    """A job that trains for hours and then compares with nan has wasted them."""
    with pytest.raises(ConfigError, match="is no limit"):
        build_artifact(make_run(document), tmp_path / "dist", limit)
    assert not Path(document["output_dir"]).exists()


def test_a_gate_that_is_not_passed_leaves_no_artifact(document, tmp_path):
    """CI must fail, and nothing half-good may be picked up."""
    with pytest.raises(NumericError, match=r"must be at most 0\.1"):
        build_artifact(make_run(document), tmp_path / "dist", 0.1)
    assert not (tmp_path / "dist").exists()
    assert (Path(document["output_dir"]) / "adapter.safetensors").exists()


def test_a_build_that_cannot_be_judged_or_placed_is_refused_at_once(document, tmp_path):
    """Before anything is trained, with both problems at once."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "old.txt").write_text("old")
    document["validation"] = {"every": 0}
    with pytest.raises(ConfigError) as caught:
        build_artifact(make_run(document), tmp_path / "dist", 1.0)
    assert "is not empty" in str(caught.value) and "nothing to score the adapter by" in str(caught.value)
    assert not Path(document["output_dir"]).exists()
