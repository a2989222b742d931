"""A slice of the kill campaign; the whole is `python -m tests.campaigns.kill`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.campaigns.kill import outcomes
from tests.conftest import ROOT


def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_was(tmp_path) -> None:
    """One 8-bit run and what it must equal, byte for byte."""
    for outcome in outcomes(tmp_path, runs=1, seed=3):
        assert not outcome.differing, str(outcome)
        assert outcome.timed + outcome.in_calls > 0, "nothing was killed, so nothing is shown"


@pytest.mark.slow
def test_every_variant_survives() -> None:
    """AdamW and 8-bit AdamW, with and without text encoder, one and two passes, keep 1 and 2."""
    command = [sys.executable, "-m", "tests.campaigns.kill", "--runs", "16", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
