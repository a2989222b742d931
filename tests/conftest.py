"""What tests share: a tiny random base of the real classes, pictures of a subject, a small run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# keep: before torch is imported; other thread counts sum in other orders, and runs are compared to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

from finetune.cli import main
from finetune.demo.subjects import write_subject_pictures
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_memory_of_scans(tmp_path_factory):
    """Scans remember pictures in the user's cache folder; the tests have their own."""
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A pipeline folder with random weights: mechanics only, it draws nothing."""
    return tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Ten captioned pictures of a subject, most of them square."""
    folder = tmp_path_factory.mktemp("pictures")
    write_subject_pictures(folder, 10)
    return folder


@pytest.fixture
def document(tiny_base, pictures, tmp_path) -> dict:
    """A small complete run: two networks trained, prior preservation off, validation on."""
    return {
        "model": {"base": str(tiny_base)},
        "data": {"folder": str(pictures), "trigger": "sks"},
        "adapter": {"rank": 4},
        "text_encoder_adapter": {"rank": 4},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "trackers": []},
        "validation": {"every": 2, "holdout": 2, "quantiles": 4},
        "checkpoint": {"every": 2},
        "output_dir": str(tmp_path / "run"),
    }


def pytest_collection_modifyitems(items):
    """The file that takes minutes goes first, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.path.parts[-2:] != ("demo", "test_job.py"))


def command(capsys, monkeypatch, *arguments, expect: int = 0) -> str:
    """The user's command in this process (no second import of torch); what it printed, on one line."""
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
    # keep: libraries of other tests (IPython) leave their own width in the environment.
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err).split())
    assert (ended.value.code or 0) == expect, text
    return text


def finetune(*arguments, expect: int = 0, **environment) -> subprocess.CompletedProcess:
    """Run the user's command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
