"""What must hold for every family with every adapter method."""

from __future__ import annotations

import itertools

import pytest
import torch

from finetune.adapters import METHODS, AdapterFile, attach
from finetune.config import AdapterConfig
from finetune.families import FAMILIES, load_family
from finetune.training.build_adapters import build_targets
from finetune.training.model import TrainableModel, enable_gradient_checkpointing
from tests import tiny

CASES = list(itertools.product(sorted(FAMILIES), sorted(METHODS)))
BUILDERS = {"sd1": tiny.tiny_pipeline}
"""A random tiny model of every family; a family without one fails here."""


class Bench:
    """A tiny model of one family with fresh adapters and fixed inputs."""

    def __init__(self, family_name, method, folder, *, text=True, **config):
        self.family, self.parts = load_family(str(BUILDERS[family_name](folder)))
        settings = AdapterConfig(method=method, rank=4, **config)
        targets = build_targets(settings, settings if text else None, 1e-3, self.family, self.parts)
        self.inputs = self._inputs()
        self.before = self.predict()
        self.adapters = attach(targets, seed=0)

    def _inputs(self):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, self.parts.denoiser.config.in_channels, 8, 8, generator=generator)
        tokens = self.family.tokenize(self.parts.tokenizers, ["a cat", "a dog on a hill"])
        return latents, torch.tensor([10, 700]), tokens

    def predict(self, grad=False):
        latents, timesteps, tokens = self.inputs
        model = TrainableModel(self.family, self.parts.denoiser, self.parts.text_encoders)
        with torch.set_grad_enabled(grad):
            return model(latents, timesteps, None, tokens, None)

    def disturb(self):
        """Stand-in for training: no trained tensor is zero afterwards."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.adapters.named_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def bench(request, tmp_path):
    return Bench(*request.param, tmp_path / "base")


@pytest.mark.parametrize("bench", CASES, indirect=True, ids="-".join)
def test_fresh_adapter_changes_nothing(bench):
    """B starts at zero, so attaching an adapter must leave the base model's output bit-identical."""
    assert torch.equal(bench.predict(), bench.before)


@pytest.mark.parametrize("bench", CASES, indirect=True, ids="-".join)
def test_every_trained_tensor_gets_a_gradient(bench):
    """With checkpointing on and embeddings frozen, libraries have lost text-encoder gradients in silence."""
    bench.disturb()
    enable_gradient_checkpointing(bench.parts.denoiser, bench.parts.text_encoders)
    bench.parts.denoiser.train()
    for encoder in bench.parts.text_encoders.values():
        encoder.train()
    bench.predict(grad=True).square().mean().backward()
    named = bench.adapters.named_parameters()
    assert {name.partition(".")[0] for name in named} == {bench.family.denoiser, *bench.family.text_encoders}
    assert [name for name, p in named.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("bench", CASES, indirect=True, ids="-".join)
def test_only_the_adapter_is_trained(bench):
    """The base stays frozen, and what is trained is fp32."""
    trained = {id(p) for p in bench.adapters.named_parameters().values()}
    for module in bench.parts.modules().values():
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == (id(parameter) in trained), name
    assert {p.dtype for p in bench.adapters.named_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_saved_adapter_gives_the_same_output(case, tmp_path):
    """Save, build everything anew, load: the output is bit-identical."""
    first = Bench(*case, tmp_path / "base")
    first.disturb()
    wanted = first.predict()
    file = first.adapters.to_file(
        first.adapters.state(), family=first.family.name, base="tiny", base_digest=first.parts.digest,
        trigger_words=("sks",), run_digest="0" * 64, step=3,
    )  # fmt: skip
    file.save(tmp_path / "adapter.safetensors")
    second = Bench(*case, tmp_path / "base")
    read = AdapterFile.read(tmp_path / "adapter.safetensors")
    second.adapters.load(read.tensors)
    assert torch.equal(second.predict(), wanted)
    assert not torch.equal(wanted, second.before)
    assert read.header.trigger_words == ("sks",)


@pytest.mark.parametrize("bench", CASES, indirect=True, ids="-".join)
def test_switching_off_gives_the_base_back(bench):
    """Validation compares with the base by switching the adapter off; that must be the base to the bit."""
    bench.disturb()
    with bench.adapters.disabled():
        assert torch.equal(bench.predict(), bench.before)
    assert not torch.equal(bench.predict(), bench.before)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "all"])
def test_presets_grow(name, preset, tmp_path):
    """Every preset finds layers in every network, and each holds the one before."""
    bench = Bench(name, "lora", tmp_path / "base", targets=preset)
    layers = {n.rsplit(".lora_", 1)[0] for n in bench.adapters.named_parameters()}
    attention = Bench(name, "lora", tmp_path / "base", targets="attention")
    assert layers >= {n.rsplit(".lora_", 1)[0] for n in attention.adapters.named_parameters()}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_adapter_start_belongs_to_the_seed_and_the_name(name, tmp_path):
    """Not to what was drawn before: the same tensor starts the same with or without a text encoder adapter."""
    both, denoiser_only = Bench(name, "lora", tmp_path / "base"), Bench(name, "lora", tmp_path / "base", text=False)
    start, alone = both.adapters.state(), denoiser_only.adapters.state()
    assert alone.keys() < start.keys()
    assert all(torch.equal(tensor, start[key]) for key, tensor in alone.items())
