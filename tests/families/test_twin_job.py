"""`finetune demo --family`: the whole job on a twin, as a user starts it."""

from __future__ import annotations

import json

import pytest

from finetune.families import FAMILIES
from tests.conftest import command


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_whole_job_runs_on_every_twin(name, tmp_path, capsys, monkeypatch):
    """Train, validate, render, export and read back; whoever doubts a family can see its path work."""
    said = command(capsys, monkeypatch, "demo", "--family", name, "-o", tmp_path / "demo")
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["family"] == name
    assert summary["trained"] > 0
    assert "pytorch_lora_weights.safetensors" in summary["exports"]
    assert (tmp_path / "demo" / "run" / "samples" / "step-000020.png").is_file()
    assert FAMILIES[name].pipeline_class in said


def test_an_unknown_family_is_answered_with_the_known_ones(capsys, monkeypatch):
    """Nobody should have to look the names up."""
    said = command(capsys, monkeypatch, "demo", "--family", "sd4", expect=2)
    assert "sdxl_refiner" in said
