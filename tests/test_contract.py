"""What must hold for every family with every adapter method."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch

from finetune.adapters import METHODS, UPDATES, AdapterFile, attach
from finetune.config import AdapterConfig, TextAdapterConfig
from finetune.families import FAMILIES, SizeConditioning, load_family
from finetune.families.twins import TWINS, write_twin
from finetune.sampling.apply import adapter_applied
from finetune.sampling.merging import merge_first
from finetune.training.build_adapters import build_targets
from finetune.training.model import TrainableModel, enable_gradient_checkpointing
from finetune.training.optimizers import build_optimizer


def cases(*everywhere):
    """All families and methods; in the default suite `everywhere` on all families, every method on the first.

    The others see the same kinds of layers there.
    """
    return [
        pytest.param((family, method), id=f"{family}-{method}",
                     marks=[] if family == "sd1" or method in everywhere else [pytest.mark.slow])
        for family, method in itertools.product(sorted(FAMILIES), sorted(METHODS))
    ]  # fmt: skip


ROUNDED = {"boft"}
"""Methods whose fresh adapter computes W x in another order, so that it equals the base up to rounding only."""


@functools.cache
def loaded(family_name):
    """A family's twin, loaded once; every bench gets a copy."""
    with tempfile.TemporaryDirectory() as folder:
        return load_family(str(write_twin(family_name, Path(folder) / "base")))


class Bench:
    """A tiny model of one family with fresh adapters and fixed inputs."""

    def __init__(self, family_name, method, *, text=True, attached=True, **config):
        self.family, parts = loaded(family_name)
        self.parts = copy.deepcopy(parts)
        latents = self.parts.vae.config.latent_channels
        generator = torch.Generator().manual_seed(0)
        tokens = self.family.tokenize(self.parts.tokenizers, ["a cat", "a dog on a hill"])
        pixels = torch.tensor([[64, 64], [64, 64]])
        sizes = SizeConditioning(pixels, torch.zeros_like(pixels), pixels)
        self.inputs = torch.randn(2, latents, 8, 8, generator=generator), torch.tensor([10, 700]), None, tokens, sizes
        if not attached:
            return
        self.before = self.predict()
        denoiser = AdapterConfig(method=method, rank=4, **config)
        encoders = TextAdapterConfig(method=method, rank=4, **config) if text else None
        targets, problems = build_targets(denoiser, encoders, 1e-3, self.family, self.parts)
        assert not problems
        self.adapters = attach(targets, seed=0)

    def predict(self, grad=False):
        with torch.set_grad_enabled(grad):
            return TrainableModel(self.family, self.parts.denoiser, self.parts.text_encoders)(*self.inputs)

    def disturb(self):
        """Stand-in for training: every trained tensor has moved, and none is zero."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.adapters.named_parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return self

    def file(self):
        return self.adapters.to_file(
            self.adapters.state(), family=self.family.name, base="tiny", base_digest=self.parts.digest,
            trigger_words=("sks",), run_digest="0" * 64, step=3,
        )  # fmt: skip


@pytest.mark.parametrize("case", cases())
def test_a_fresh_adapter_changes_nothing_and_switched_off_there_is_none(case):
    """Training starts at the base, and validation and the teacher compare with it: to the bit."""
    bench = Bench(*case)
    if case[1] in ROUNDED:
        torch.testing.assert_close(bench.predict(), bench.before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(bench.predict(), bench.before)
    bench.disturb()
    with bench.adapters.disabled():
        assert torch.equal(bench.predict(), bench.before)
    assert not torch.equal(bench.predict(), bench.before)


@pytest.mark.parametrize("case", cases("lora", "full"))
def test_every_trained_tensor_learns_and_nothing_else(case):
    """With checkpointing on and embeddings frozen, libraries have lost text-encoder gradients in silence.

    8-bit Adam moves every tensor; the base's own stay, to the bit and frozen.
    """
    bench = Bench(*case).disturb()
    named = bench.adapters.named_parameters()
    trained = {id(p) for p in named.values()}
    frozen = [p for m in bench.parts.modules().values() for p in m.parameters() if id(p) not in trained]
    base = [p.clone() for p in frozen]
    enable_gradient_checkpointing(bench.parts.denoiser, bench.parts.text_encoders)
    for module in (bench.parts.denoiser, *bench.parts.text_encoders.values()):
        module.train()
    before = bench.adapters.state()
    optimizer = eight_bit(bench)
    bench.predict(grad=True).square().mean().backward()
    assert {name.partition(".")[0] for name in named} == {bench.family.denoiser, *bench.family.usual_encoders()}
    assert [name for name, p in named.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    optimizer.step()
    assert [name for name, p in named.items() if torch.equal(p, before[name])] == []
    assert {p.dtype for p in named.values()} == {torch.float32}
    assert not any(p.requires_grad for p in frozen)
    assert all(torch.equal(p, kept) for p, kept in zip(frozen, base, strict=True))


def eight_bit(bench):
    from finetune.config import OptimizerConfig

    return build_optimizer(
        OptimizerConfig(name="adamw8bit", learning_rate=1e-2), bench.adapters.parameter_groups(), torch.device("cpu")
    ).optimizer


@pytest.mark.parametrize("case", cases("lora"))
def test_a_saved_adapter_means_the_same_to_every_reader(case, tmp_path):
    """Loaded into a new run: to the bit. Applied by sampling, or merged by the formulas: up to rounding."""
    first = Bench(*case).disturb()
    wanted = first.predict()
    path = tmp_path / "adapter.safetensors"
    first.file().save(path)
    read = AdapterFile.read(path)
    assert read.header.trigger_words == ("sks",)
    second = Bench(*case)
    second.adapters.load(read.tensors)
    assert torch.equal(second.predict(), wanted)
    plain = Bench(*case, attached=False)
    untouched = plain.predict()
    with adapter_applied(plain.family, plain.parts, read):
        torch.testing.assert_close(plain.predict(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(plain.predict(), untouched)
    digest = plain.parts.digest
    merge_first([str(path)], plain.family, plain.parts)
    torch.testing.assert_close(plain.predict(), wanted, rtol=1e-3, atol=1e-4)
    assert plain.parts.digest != digest


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_presets_grow(name):
    """Every preset finds layers in every network, and each holds the one before."""
    layers = [
        {n.rsplit(".lora_", 1)[0] for n in Bench(name, "lora", targets=preset).adapters.named_parameters()}
        for preset in ("attention", "attention+mlp", "all")
    ]
    assert layers[0] < layers[1] <= layers[2]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_adapter_start_belongs_to_the_seed_and_the_name(name):
    """Not to what was drawn before: the same tensor starts the same with or without a text encoder adapter."""
    start, alone = Bench(name, "lora").adapters.state(), Bench(name, "lora", text=False).adapters.state()
    assert alone.keys() < start.keys()
    assert all(torch.equal(tensor, start[key]) for key, tensor in alone.items())


def test_every_family_has_a_twin_and_every_method_a_formula():
    """A family without a tiny model, or a method without a formula, would go untested."""
    assert set(FAMILIES) == set(TWINS)
    assert set(METHODS) == set(UPDATES)
