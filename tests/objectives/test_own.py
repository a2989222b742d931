"""Weightings, densities and losses of the user's own: named by import path, tried before the first step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from finetune import make_run
from finetune.errors import ConfigError
from finetune.objectives import build_objective

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
RIGHT = '''
def weight(alpha, sigma, x0_gain, parameters):
    return (alpha / sigma) ** 0.5

def density(u, parameters):
    return u ** 2

def loss(prediction, target, delta):
    return (prediction - target).abs() ** 1.5
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A file in the working directory; every test has one of another name, for Python imports a module once."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(RIGHT)
    return name


def test_own_functions_are_what_is_trained_with(module: str) -> None:
    """Each formula as written, in place of the table's."""
    plain = build_objective(SD15)
    mine = build_objective(SD15, weighting=f"{module}.weight", density=f"{module}.density", loss=f"{module}.loss")
    u = torch.linspace(0.1, 0.9, 8)
    timesteps = mine.timesteps(u)
    assert torch.equal(timesteps, plain.schedule.timesteps(u**2))
    alpha, sigma = plain.schedule.alpha_sigma(timesteps)
    assert torch.equal(mine.weight(timesteps), (alpha / sigma) ** 0.5)
    x0, noise = torch.randn(2, 8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = (x0 - noise).abs().pow(1.5).flatten(1).mean(1) * (alpha / sigma) ** 0.5
    torch.testing.assert_close(mine.loss(x0, x0, noise, timesteps), expected)


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("weighting", "def f(alpha, sigma, x0_gain, parameters): return 1.0", "no tensor but a value of type float"),
        ("weighting", "def f(alpha, sigma, x0_gain, parameters): return alpha.sum()", r"shape \(\) instead of \(64,\)"),
        ("weighting", "def f(alpha, sigma, x0_gain, parameters): return -alpha", "negative weight teaches"),
        ("weighting", "def f(alpha, sigma, x0_gain, parameters): return alpha / 0", "values that are not finite"),
        ("weighting", "def f(alpha): return alpha", "f fails: TypeError: f"),
        ("weighting", "def f(alpha, *rest):\n    return nothing", r"f fails in own_\d+\.py, line 2: NameError"),
        ("density", "def f(u, parameters): return 2 * u", "levels go from 0"),
        ("density", "def f(u, parameters): return 1 - u", "falls somewhere as the quantile rises"),
        ("loss", "def f(x, y, delta): return ((x - y) ** 2).mean()", r"shape \(\) instead of \(2, 4, 8, 8\)"),
        ("loss", "def f(x, y, delta): return (x - y).detach() ** 2", "no gradient, so nothing would be learned"),
        ("loss", "f = 3", "no function but of type int"),
        ("loss", "def g(): pass", "has no attribute 'f'"),
        ("loss", "raise RuntimeError('half written')", "cannot be imported: half written"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_paid_for(module: str, field: str, text: str, said: str) -> None:
    """Field, function and reason; a broadcast or a sign that is wrong would train for hours."""
    Path(f"{module}.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"objective\.{field}={module}\.f: .*{said}"):
        build_objective(SD15, **{field: f"{module}.f"})


def test_a_function_that_fails_later_names_its_line(module: str) -> None:
    """A trial cannot meet every case; hours later it must still be plain whose code it was, and where."""
    Path(f"{module}.py").write_text(
        "def loss(prediction, target, delta):\n    if len(prediction) == 3:\n        raise KeyError('late')\n"
        "    return (prediction - target) ** 2\n"
    )
    mine = build_objective(SD15, loss=f"{module}.loss")
    x0 = torch.zeros(3, 4, 8, 8)
    with pytest.raises(ConfigError, match=rf"{module}\.loss fails in {module}\.py, line 3: KeyError: 'late'"):
        mine.loss(x0, x0, x0, torch.tensor([1, 2, 3]))


def test_a_module_that_is_not_there_is_said_with_where_to_put_it() -> None:
    """The usual reason is another working directory."""
    with pytest.raises(ConfigError, match="No module named 'nowhere'; put its file into the folder"):
        build_objective(SD15, loss="nowhere.loss")


def test_a_slip_of_the_pen_is_no_import_path() -> None:
    """A name without a dot is a name of the table."""
    document = {"model": {"base": "demo"}, "data": {"folder": "photos"}, "output_dir": "runs/x"}
    with pytest.raises(ConfigError, match=r"did you mean min_snr\?.*a function of your own as module\.function"):
        make_run(document | {"objective": {"weighting": "minsnr"}})


def test_an_edited_file_is_read_again_and_noted_as_what_was_run(module: str) -> None:
    """In a notebook: train, edit, train again. Python imports once, and a wrong note would claim other code."""
    file = Path(f"{module}.py")
    first = build_objective(SD15, loss=f"{module}.loss")
    file.write_text(RIGHT.replace("1.5", "2.5"))
    second = build_objective(SD15, loss=f"{module}.loss")
    x0, noise = torch.full((1, 4, 8, 8), 4.0), torch.zeros(1, 4, 8, 8)
    losses = [float(built.loss(x0, x0, noise, torch.tensor([500]))) for built in (first, second, first)]
    assert losses == pytest.approx([8.0, 32.0, 8.0]), "each asks what its file said when it was built"
    digests = [hashlib.sha256(RIGHT.replace("1.5", power).encode()).hexdigest() for power in ("1.5", "2.5")]
    assert [built.own_code()["objective.loss"] for built in (first, second)] == digests
    file.write_text("raise RuntimeError('half written')")
    with pytest.raises(ConfigError, match="half written"):
        build_objective(SD15, loss=f"{module}.loss")
