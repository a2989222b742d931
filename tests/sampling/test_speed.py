"""What makes drawing faster leaves the picture as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.families import load_family
from finetune.sampling.apply import adapter_applied
from finetune.sampling.generate import generate
from finetune.sampling.speed import check_compiler, compiled, lay_out
from finetune.sampling.wanted import Wanted
from tests.conftest import finetune
from tests.sampling.test_controlnet import apart
from tests.tiny import random_adapter, write_twin

QUICK = {"seeds": [1], "steps": 3, "height": 64, "width": 64}


def test_channels_come_last_only_in_half_precision_on_a_gpu():
    """Tensor cores read them so; elsewhere nothing is gained. What is computed is the same."""
    family, parts = load_family("demo")
    plain = generate(family, parts, ["a box"], **QUICK)[0]
    layer = parts.denoiser.conv_in
    for device in ("cpu", "cuda"):
        lay_out(parts.denoiser, torch.device(device))
        assert layer.weight.is_contiguous(), "fp32"
    # keep: the rule asks for no more than the device's name, so a network on a CPU shows what it does.
    lay_out(parts.denoiser.to(torch.bfloat16), torch.device("cpu"))
    assert layer.weight.is_contiguous()
    lay_out(parts.denoiser, torch.device("cuda"))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    parts.denoiser = load_family("demo")[1].denoiser.to(memory_format=torch.channels_last)
    assert apart(generate(family, parts, ["a box"], **QUICK)[0], plain) <= 1


def test_nothing_is_left_of_compiled_code():
    """Blocks and the limit of recompilations are afterwards as they were; what failed inside is told."""
    network = nn.Sequential(nn.Linear(2, 2))
    parts = load_family("demo")[1]
    limit = torch._dynamo.config.recompile_limit
    with pytest.raises(ZeroDivisionError), compiled(parts.denoiser):
        held = [part for part in parts.denoiser.modules() if part._compiled_call_impl is not None]
        assert {type(part).__name__ for part in held} == {"BasicTransformerBlock"}
        assert torch._dynamo.config.recompile_limit > limit
        raise ZeroDivisionError
    assert all(part._compiled_call_impl is None for part in parts.denoiser.modules())
    assert torch._dynamo.config.recompile_limit == limit
    with compiled(network):
        assert network(torch.ones(1, 2)).shape == (1, 2)


def test_a_machine_without_a_compiler_is_refused_before_the_base_is_loaded(tmp_path):
    """With the reason, and with what to do."""
    none = {"CXX": str(tmp_path / "none"), "CC": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    none["PATH"] = str(tmp_path)
    done = finetune("sample", "a box", "--compile", "-o", tmp_path / "out", expect=2, **none)
    text = done.stdout + done.stderr
    assert "--compile needs a compiler for cpu, and there is none that works" in text
    assert "leave --compile out" in text and "Loading" not in text and "Traceback" not in text
    assert any("choose one" in problem for problem in Wanted(("a",), compile=True, low_memory=True).problems())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_compiled_code_draws_the_same_with_an_adapter(name, tmp_path):
    """Adapters are hooks, which compiled code must not leave out; afterwards nothing is left of it."""
    check_compiler(torch.device("cpu"))
    family, parts = load_family(str(write_twin(name, Path(tmp_path) / "base")))
    where = family.denoiser
    file = random_adapter(family, parts, rank={where: 4}, alpha={where: 4.0}, preset="attention", strength=0.3)
    plain = generate(family, parts, ["a cat"], **QUICK)[0]
    wanted = generate(family, parts, ["a cat"], adapters=[(file, 1.0)], **QUICK)[0]
    with adapter_applied(family, parts, file), compiled(parts.denoiser):
        drawn = generate(family, parts, ["a cat"], **QUICK)[0]
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert apart(drawn, wanted) <= 1
    assert apart(wanted, plain) > 10
    assert apart(generate(family, parts, ["a cat"], **QUICK)[0], plain) == 0
