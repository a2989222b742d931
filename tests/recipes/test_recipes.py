"""Recipes and notebooks run as they are shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from finetune.run_files import recipe_names
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.py"))


def test_accelerate_launch_runs_a_recipe(tiny_base, pictures, tmp_path):
    """The way the README shows it: a recipe is a script that accelerate launches."""
    recipe = recipe_names()["sd15-lora"]
    values = {
        "model.base": tiny_base, "model.variant": "null", "data.folder": pictures, "data.resolution": 64,
        "train.steps": 2, "optimizer.warmup_steps": 0, "output_dir": tmp_path / "run",
    }  # fmt: skip
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", str(recipe), *sets],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "exports" / "run.safetensors").exists()


COLAB = """
from pathlib import Path

class drive: mount = staticmethod(lambda place: Path("mounted").write_text(place))
class files: download = staticmethod(lambda path: Path("downloaded").write_text(path))
class output:
    @staticmethod
    def serve_kernel_port_as_iframe(port, height):
        from urllib.request import urlopen
        Path("page").write_bytes(urlopen(f"http://127.0.0.1:{port}/").read())
"""
"""What the notebook asks of Colab, noting what it was asked."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_runs(path, tmp_path, pictures, monkeypatch):
    """Every cell as in Colab, on the embedded base; only the parameters and what Colab itself does are replaced."""
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").write_text(COLAB)
    notebook = jupytext.read(path)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    values = {
        "BASE": "demo", "VARIANT": None, "PICTURES": str(pictures), "TRIGGER": "sks", "CLASS": "robot",
        "OUTPUT": str(tmp_path / "drive" / "out"), "CACHE": str(tmp_path / "cache"),
        "STEPS": 2, "CLASS_PICTURES": 2, "HOURS": 1.0, "INSTALL_FROM": str(ROOT),
    }  # fmt: skip
    names = {line.split(" = ")[0] for line in parameters.source.splitlines() if " = " in line}
    assert names == values.keys(), "the test must replace exactly the notebook's parameters"
    parameters.source = "\n".join(["import google.colab", *(f"{name} = {value!r}" for name, value in values.items())])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    out = tmp_path / "drive" / "out"
    sheets = sorted(p.name for p in (out / "samples").glob("*.png"))
    assert sheets == ["step-000000.png", "step-000002.png", "steps.png"]
    assert (tmp_path / "mounted").read_text() == "/content/drive"
    assert "<html" in (tmp_path / "page").read_text(), "the page is there before training begins"
    assert (tmp_path / "downloaded").read_text() == str(out / "exports" / "out.safetensors")
    assert (out / "exports" / "out.safetensors").is_file()


COLAB_BEGINS = """
import importlib, os, subprocess, sys
from pathlib import Path

content, site, root = map(Path, sys.argv[1:])
sys.path[:0] = [str(content), str(content / "fakes")]
sys.path.append(str(site))
import google.colab, jupytext

def pip(command, check):
    print("ASKED", *command[3:])
    if "install" in command:
        for name in ("finetune", "data_tools"):
            (site / name).symlink_to(root / name)

cells = [cell.source for cell in jupytext.read(content / "finetune" / "notebook.py").cells if cell.cell_type == "code"]
names = {"__name__": "__main__"}
exec(cells[0], names)
names.update(INSTALL_FROM=str(content / "finetune"), BASE="demo")
subprocess.run = pip
exec(cells[1], names)
import finetune
print("FOUND", finetune.__file__)
"""
"""The first cells, in an interpreter that starts in the folder of the clone; pip is the only thing replaced."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_installs_the_toolkit_beside_its_clone(path, tmp_path):
    """Colab starts in /content, where the clone lies: a folder called finetune that can be imported and holds nothing.
    """
    content, site = tmp_path / "content", tmp_path / "site"
    (content / "fakes" / "google" / "colab").mkdir(parents=True)
    (content / "fakes" / "google" / "colab" / "__init__.py").write_text(COLAB)
    (content / "finetune").mkdir()
    for name in ("finetune", "data_tools"):
        (content / "finetune" / name).symlink_to(ROOT / name)
    (content / "finetune" / "notebook.py").symlink_to(path)
    site.mkdir()
    for installed in Path(jupytext.__file__).parents[1].iterdir():
        if "finetune" not in installed.name:
            (site / installed.name).symlink_to(installed)
    done = subprocess.run(
        [sys.executable, "-S", "-c", COLAB_BEGINS, str(content), str(site), str(ROOT)], cwd=content,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stdout.splitlines() if line.startswith("ASKED")]
    address = (content / "finetune").as_uri()
    assert asked == [f"ASKED --quiet install finetune[heic] @ {address}", "ASKED --quiet uninstall --yes torchao"]
    assert f"FOUND {site}" in done.stdout


def test_a_notebook_shows_what_to_mend_and_no_traceback():
    """A wrong folder, or a run stopped by its button, must not look like a crash of the program."""
    cells = [
        f'from {where} import {error}\nraise {error}("It cannot start:", ["no pictures"])'
        for where, error in (("finetune.errors", "ConfigError"), ("data_tools.errors", "DataToolsError"))
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True).execute()
    for cell in notebook.cells:
        assert cell.outputs[0].traceback == ["It cannot start:", "  - no pictures"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_file_is_the_text(path):
    """Colab opens .ipynb; it is made from the text, which is what people edit and review."""
    made = json.loads(nbformat.writes(jupytext.read(path)))
    stored = json.loads(path.with_suffix(".ipynb").read_text())
    assert [(c["cell_type"], c["source"]) for c in made["cells"]] == [
        (c["cell_type"], c["source"]) for c in stored["cells"]
    ], "run `make notebooks`"


def test_every_recipe_says_for_whom_it_is():
    """The docstring's first line is what `finetune init` lists."""
    for name, path in recipe_names().items():
        first = Path(path).read_text().splitlines()[0]
        assert first.startswith('"""') and len(first) > 30, name
