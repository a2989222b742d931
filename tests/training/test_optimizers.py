"""Optimizers are what their names say, and their state survives a checkpoint to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from finetune import make_run
from finetune.config import OptimizerConfig
from finetune.errors import CheckpointError, ConfigError
from finetune.storage import read_safetensors, write_safetensors
from finetune.training.optimizer_state import load_optimizer_state, optimizer_state, state_bytes
from finetune.training.optimizers import (
    OPTIMIZERS,
    BuiltOptimizer,
    build_optimizer,
    own_code,
    rehearse,
    set_learning_rate,
)

BY_PATH = ("torch.optim.RAdam", "torch.optim.SGD", "pytorch_optimizer.StableAdamW")
EVERY = (*OPTIMIZERS, *BY_PATH)

SHAPES = {
    "unet.a.lora_A.weight": (32, 32),  # 1024 elements: the smallest that is kept in 8 bits
    "unet.a.lora_B.weight": (31, 33),  # 1023: kept in 32 bits
    "unet.conv.lora_A.weight": (65, 9, 3, 3),  # 5265: the last block of 256 is not full
    "text_encoder.b.lora_A.weight": (4, 8),
}
CPU = torch.device("cpu")


def make_parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def build(
    name: str, parameters: dict[str, Parameter], device: torch.device = CPU, **settings: Any
) -> BuiltOptimizer:
    unet = [p for n, p in parameters.items() if n.startswith("unet")]
    text = [p for n, p in parameters.items() if n.startswith("text")]
    rates = (1.0, 1.0) if name == "prodigy" else (1e-2, 5e-3)
    groups = [
        {"params": unet, "lr": rates[0], "name": "unet"},
        {"params": text, "lr": rates[1], "name": "text_encoder"},
    ]
    return build_optimizer(OptimizerConfig(name=name, **settings), groups, device)


def take_steps(built: BuiltOptimizer, parameters: dict[str, Parameter], start: int, stop: int) -> None:
    """Steps whose gradients and rates depend on the step alone."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(built.optimizer, 1 / (1 + step))
        built.optimizer.step()


def names_of(parameters: dict[str, Parameter]) -> dict[Parameter, str]:
    return {parameter: name for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_resume_is_bit_exact(name: str, cut: int, tmp_path: Path) -> None:
    """7 steps at once = cut + the rest through files, in weights and in every byte of state."""
    whole = make_parameters()
    built = build(name, whole)
    take_steps(built, whole, 0, 7)

    first = make_parameters()
    interrupted = build(name, first)
    take_steps(interrupted, first, 0, cut)
    tensors, scalars = optimizer_state(interrupted.optimizer, names_of(first))
    write_safetensors(tmp_path / "optimizer.safetensors", tensors, {})
    (tmp_path / "optimizer.json").write_text(json.dumps(scalars))

    second = {name: Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = build(name, second)
    take_steps(resumed, second, 50, 51)  # whatever was there before loading must be gone
    with torch.no_grad():
        for key, parameter in second.items():
            parameter.copy_(first[key])
    loaded, _ = read_safetensors(tmp_path / "optimizer.safetensors")
    document = json.loads((tmp_path / "optimizer.json").read_text())
    load_optimizer_state(resumed.optimizer, names_of(second), loaded, document)
    take_steps(resumed, second, cut, 7)

    for key in SHAPES:
        assert torch.equal(whole[key], second[key]), key
    expected, numbers = optimizer_state(built.optimizer, names_of(whole))
    got, got_numbers = optimizer_state(resumed.optimizer, names_of(second))
    assert numbers == got_numbers and expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_8_bit_is_really_8_bit() -> None:
    """Tensors of 1024 elements and more hold bytes; smaller ones stay 32-bit, and the user is told."""
    parameters = make_parameters()
    built = build("adamw8bit", parameters)
    take_steps(built, parameters, 0, 1)
    large, small = 1024 + 65 * 81, 1023 + 32
    blocks = 4 + 21
    assert state_bytes(built.optimizer) == {
        "uint8": 2 * large,
        "float32": 2 * 4 * small + 2 * 4 * blocks + 2 * 4 * 256,  # state, block scales, two shared code books
    }
    assert built.resolved == "bitsandbytes AdamW8bit"
    assert any("2 of 4 trained tensors (14% of the parameters)" in note for note in built.notes)


def test_adamw_is_torchs_with_32_bit_state() -> None:
    """8 bytes per parameter, and one step counter per tensor."""
    parameters = make_parameters()
    built = build("adamw", parameters)
    assert state_bytes(built.optimizer) == {}
    take_steps(built, parameters, 0, 1)
    elements = sum(parameter.numel() for parameter in parameters.values())
    assert state_bytes(built.optimizer) == {"float32": 8 * elements + 4 * len(parameters)}
    assert built.notes == () and built.optimizer.defaults["fused"] is True


def test_8_bit_walks_like_32_bit() -> None:
    """The same settings must mean the same training: the paths stay close over 30 steps."""
    paths: dict[str, dict[str, Parameter]] = {}
    for name in ("adamw", "adamw8bit"):
        paths[name] = make_parameters()
        take_steps(build(name, paths[name]), paths[name], 0, 30)
    for key, start in make_parameters().items():
        moved = (paths["adamw"][key] - start).norm()
        apart = (paths["adamw"][key] - paths["adamw8bit"][key]).norm()
        assert apart < 0.05 * moved, key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_group_keeps_its_own_rate(name: str) -> None:
    """A text encoder's smaller rate must not be lost when the schedule moves."""
    built = build(name, make_parameters())
    own = [group["initial_lr"] for group in built.optimizer.param_groups]
    assert own == ([1.0, 1.0] if name == "prodigy" else [1e-2, 5e-3])
    for factor in (0.5, 1.0):
        set_learning_rate(built.optimizer, factor)
        rates = [float(group["lr"]) for group in built.optimizer.param_groups]
        assert rates == pytest.approx([factor * rate for rate in own])


def test_a_tensor_rate_is_filled_in_place() -> None:
    """A recorded CUDA graph reads the rate from a fixed address."""
    parameter = Parameter(torch.zeros(3))
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": rate, "initial_lr": 0.1}])
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.025)


def test_paged_on_a_cpu_says_that_it_is_not_paged() -> None:
    """Never a silent replacement; and no warning from the library at every step."""
    built = build("paged_adamw8bit", make_parameters())
    assert built.resolved == "bitsandbytes AdamW8bit"
    assert built.notes[0] == "paged_adamw8bit pages on CUDA only; on cpu it is adamw8bit."


def test_a_device_without_8_bit_kernels_gets_adamw_and_a_note() -> None:
    """Apple's GPUs have no 8-bit kernels; the replacement is said aloud with its price."""
    parameters = {"unet.a": Parameter(torch.empty(1024, 1024, device="meta"))}
    built = build("adamw8bit", parameters, torch.device("mps"))
    assert built.resolved == "torch AdamW"
    assert "no 8-bit kernels for mps" in built.notes[0] and "6.0 MiB more" in built.notes[0]


def test_missing_bitsandbytes_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with another optimizer than the one asked for would be a silent substitute."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install bitsandbytes.*optimizer\.name=adamw"):
        build("adamw8bit", make_parameters())


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("torch.optim.RAdamW", {}, r"torch\.optim has no RAdamW \(did you mean RAdam\?\)"),
        ("nowhere.Optimizer", {}, "needs the package nowhere, which is missing"),
        ("torch.nn.Linear", {}, r"torch\.nn\.Linear is no torch\.optim\.Optimizer"),
        ("prodigy", {"options": {"d_coeff": 2}}, r"'d_coeff' \(did you mean d_coef\?\)"),
        ("adafactor", {"betas": (0.9, 0.99)}, "Adafactor has no such setting"),
        ("adamw", {"options": {"lr": 1}}, r"has 'lr'; say optimizer\.learning_rate"),
        ("torch.optim.SGD", {"options": {"momentum": -1}}, "SGD refuses its settings: Invalid momentum"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, settings: dict[str, Any], expected: str) -> None:
    """Any class may be named, so every mistake in naming it needs words."""
    with pytest.raises(ConfigError, match=expected):
        build(name, make_parameters(), **settings)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("adamw", {"betas": (0.9, 0.99, 0.999)}, "adamw cannot take a step here: too many values"),
        ("torch.optim.LBFGS", {}, "LBFGS cannot take a step here: .*closure"),
        ("torch.optim.SparseAdam", {}, "SparseAdam cannot take a step here: .*dense gradients"),
        ("torch.optim.RAdamW", {}, r"did you mean RAdam"),
    ],
)
def test_what_cannot_step_is_found_early(name: str, settings: dict[str, Any], expected: str) -> None:
    """After a base of gigabytes and an hour of class pictures is late for a typing error."""
    with pytest.raises(ConfigError, match=expected):
        rehearse(OptimizerConfig(name=name, **settings), CPU)


@pytest.mark.parametrize("name", EVERY)
def test_a_rehearsal_passes_what_can_be_used(name: str) -> None:
    """A check that refuses a good optimizer would be worse than none."""
    rehearse(OptimizerConfig(name=name), CPU)


def test_only_a_file_of_ones_own_is_held_against_a_resumed_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may be updated between two halves of a run; the user's own formula may not change in the middle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "signs.py").write_text("from torch.optim import SGD\n\nclass Signs(SGD):\n    pass\n")
    assert own_code("adamw") == own_code("torch.optim.RAdam") == {}
    assert [len(digest) for digest in own_code("signs.Signs").values()] == [64]
    (tmp_path / "broken.py").write_text("x = (\n")
    with pytest.raises(ConfigError, match=r"broken cannot be imported: .*never closed"):
        own_code("broken.Signs")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prodigy and its like are extras; the message is the command to type."""
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ConfigError, match=r"pip install 'finetune\[optimizers\]'"):
        build("prodigy", make_parameters())


def test_prodigy_refuses_two_rates() -> None:
    """It finds one step size; two would fail in the first step, after the base is loaded and encoded."""
    groups = [
        {"params": [Parameter(torch.ones(2))], "lr": 1.0, "name": "a"},
        {"params": [Parameter(torch.ones(2))], "lr": 0.5, "name": "b"},
    ]
    with pytest.raises(ConfigError, match=r"learning rates 0\.5, 1"):
        build_optimizer(OptimizerConfig(name="prodigy"), groups, CPU)


RUN = {"model": {"base": "demo"}, "data": {"folder": "photos"}, "output_dir": "runs/x"}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"optimizer": {"name": "prodigy"}}, "optimizer.learning_rate comes to 0.0001 with prodigy"),
        (
            {"optimizer": {"name": "prodigyopt.Prodigy", "learning_rate": 1}, "adapter": {"learning_rate": 1e-4}},
            "adapter.learning_rate comes to 0.0001 with prodigyopt.Prodigy",
        ),
        (
            {"optimizer": {"name": "pytorch_optimizer.DAdaptAdam", "learning_rate": 1}, "tokens": {
                "words": {"<a>": "b"}, "learning_rate": 5e-3}},
            "tokens.learning_rate comes to 0.005",
        ),
        (
            {"optimizer": {"name": "prodigy", "learning_rate": 1}, "adapter": {"lora_plus_ratio": 16}},
            "several learning rates: optimizer.learning_rate (1), adapter.lora_plus_ratio (16)",
        ),
        (
            {"optimizer": {"name": "prodigy", "learning_rate": 1}, "adapter": {"blocks": [
                {"pattern": "mid", "learning_rate": 0.5}, {"pattern": "up", "rank": 0, "learning_rate": 9}]}},
            "several learning rates: optimizer.learning_rate (1), adapter.blocks[0].learning_rate (0.5)",
        ),
        (
            {"optimizer": {"name": "prodigy", "learning_rate": 1}, "text_encoder_adapter": {
                "per_encoder": {"text_encoder": {"learning_rate": 0.3}}}},
            "text_encoder_adapter.per_encoder.text_encoder.learning_rate (0.3)",
        ),
    ],
)  # fmt: skip
def test_what_finds_its_step_size_is_given_one_rate_near_one(sections: dict[str, Any], named: str) -> None:
    """Whichever field decides the rate, and before the base is loaded."""
    with pytest.raises(ConfigError) as caught:
        make_run(RUN | sections)
    assert named in " ".join(str(caught.value).split())


def test_a_rate_that_nothing_is_trained_with_is_not_judged() -> None:
    """optimizer.learning_rate is only what adapters without their own take."""
    make_run(RUN | {"optimizer": {"name": "prodigy"}, "adapter": {"learning_rate": 1.0}})


def saved_state(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parameters = make_parameters()
    built = build(name, parameters)
    take_steps(built, parameters, 0, 2)
    tensors, scalars = optimizer_state(built.optimizer, names_of(parameters))
    return dict(tensors), json.loads(json.dumps(scalars))


def test_state_of_another_optimizer_is_refused() -> None:
    """The formats differ; a fresh state under an old step count would be silently wrong."""
    parameters = make_parameters()
    built = build("adamw", parameters)
    saved = saved_state("adamw8bit")
    with pytest.raises(CheckpointError, match="by bitsandbytes AdamW8bit and this run uses torch AdamW"):
        load_optimizer_state(built.optimizer, names_of(parameters), *saved)


def test_state_of_other_parameters_is_refused_and_nothing_is_loaded() -> None:
    """Missing, foreign, mis-shaped and half-saved state are all named at once."""
    tensors, scalars = saved_state("adamw8bit")
    scalars["parameters"]["unet.z"] = scalars["parameters"].pop("unet.a.lora_A.weight")
    tensors["unet.a.lora_B.weight.state1"] = torch.zeros(5, 5)
    parameters = make_parameters()
    built = build("adamw8bit", parameters)
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(built.optimizer, names_of(parameters), tensors, scalars)
    text = str(caught.value)
    assert "unet.a.lora_A.weight is trained in this run but not in it" in text
    assert "unet.z is in it but not trained in this run" in text
    assert "unet.a.lora_B.weight.state1 has shape [5, 5], but the parameter has [31, 33]" in text
    assert "not whole" in text
    assert not built.optimizer.state
