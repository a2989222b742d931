"""What the README shows, runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.demo.subjects import write_subject_pictures
from finetune.run_files import recipe_names
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The first code block of a language under a heading."""
    found = re.search(rf"## {heading}.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no {language} block under {heading}"
    return found.group(1)


def quick(base: Path) -> dict[str, str]:
    """What makes a real recipe run on a tiny base in seconds."""
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(base), 'variant: "fp16"': "variant: null",
        "steps: 800": "steps: 2", "images: 100": "images: 2", "inference_steps: 30": "inference_steps: 2",
        "inference_steps: 25": "inference_steps: 2", "resolution: null": "resolution: 64",
    }  # fmt: skip


def test_your_own_pictures_in_five_lines(tiny_base, tmp_path):
    """Line by line, in a folder of its own, with a tiny base for the big one."""
    write_subject_pictures(tmp_path / "photos", 6)
    for sidecar in (tmp_path / "photos").glob("*.txt"):
        sidecar.unlink()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
    for line in block("Your own pictures", "bash").splitlines():
        if line.startswith("# edit my.yaml"):
            text = (tmp_path / "my.yaml").read_text()
            for old, new in quick(tiny_base).items():
                assert old in text, old
                text = text.replace(old, new)
            (tmp_path / "my.yaml").write_text(text)
            continue
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "sd15-dreambooth.safetensors" in done.stdout


def test_the_python_example_runs(tiny_base, tmp_path, pictures, monkeypatch):
    """The same from Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(pictures)
    extra = {"model.base": str(tiny_base), "model.variant": None, "train.steps": 2, "optimizer.warmup_steps": 0,
             "data.resolution": 64, "validation.holdout": 1}  # fmt: skip
    code = block("Ways in", "python")
    exec(code.replace('"output_dir": "runs/mine"', f'"output_dir": "runs/mine", **{extra!r}'), {})
    assert (tmp_path / "runs" / "mine" / "exports" / "mine.safetensors").exists()


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_link_leads_somewhere(path):
    """A dead link on the first page is the first lie."""
    assert (ROOT / path).exists()


def test_every_recipe_is_in_the_table():
    """The table of recipes is what people choose from."""
    for name in recipe_names():
        assert f"`{name}`" in README
