"""Which layers get what, and what is said when it cannot be."""

from __future__ import annotations

import pytest
import torch

from finetune.adapters import Block
from tests.adapters.nets import LAYERS, adapted, file_of, net, plan, wish


def test_ranks_and_rates_by_pattern():
    """The first block that is found in a name counts; what it leaves open comes from the adapter."""
    blocks = (Block("lin", rank=2, learning_rate=5e-4), Block("linear|plain", alpha=8.0), Block("point", rank=0))
    layers, problems = plan(net(), wish("lora", LAYERS, blocks=blocks, conv=Block("", rank=6)))
    assert problems == []
    assert {name: (p.rank, p.alpha, p.learning_rate) for name, p in layers.items()} == {
        "linear": (2, 1.0, 5e-4),
        "plain": (4, 8.0, 1e-3),
        "conv": (6, 3.0, 1e-3),
    }


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "loha", "lokr"])
def test_the_file_says_every_layers_own_rank_and_strength(method):
    """A reader that takes one alpha for all layers would apply some of them wrongly."""
    blocks = (Block("plain", rank=2), Block("conv", alpha=3.0))
    live = net()
    file = file_of(adapted(live, wish(method, LAYERS, blocks=blocks)))
    assert file.header.rank_pattern == {"unet.plain": 2}
    assert file.header.alpha_pattern == {"unet.plain": 1.0, "unet.conv": 3.0}
    for component, name in file.layers():
        assert file.scale(component, name) == pytest.approx(live.get_submodule(name).scaling["default"])


def test_lora_plus_gives_b_its_own_rate():
    """Groups hold one learning rate each, and every parameter is in one of them."""
    adapters = adapted(net(), wish("lora", LAYERS, lora_plus_ratio=16.0))
    rates = {id(p): g["lr"] for g in adapters.parameter_groups() for p in g["params"]}
    named = adapters.named_parameters()
    assert len(rates) == len(named)
    assert {name.rpartition("lora_")[2]: rates[id(p)] for name, p in named.items()} == {
        "A.weight": 1e-3,
        "B.weight": 1.6e-2,
    }


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_starts_change_nothing_and_repeat(init):
    """Another start of the factors is no other start of the model, and the same seed gives the same bits."""
    first, second, other = net(), net(), net()
    states = [
        adapted(module, wish("lora", LAYERS, init=init), seed=seed).state()
        for module, seed in ((first, 0), (second, 0), (other, 1))
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    rows, picture = torch.randn(3, 8), torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(first(rows, picture), net()(rows, picture), rtol=1e-5, atol=1e-5)
    drawn = init in ("gaussian", "orthogonal")
    assert drawn == any(not torch.allclose(tensor, states[2][name], atol=1e-4) for name, tensor in states[0].items())


def test_pissa_starts_with_the_strongest_directions():
    """B A must be the best approximation of W of its rank: Eckart and Young."""
    state = adapted(net(), wish("lora", "linear", init="pissa", rank=3, alpha=6.0)).state()
    weight = net().linear.weight.detach()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    product = 2.0 * state["unet.linear.lora_B.weight"] @ state["unet.linear.lora_A.weight"]
    torch.testing.assert_close(product, left[:, :3] * values[:3] @ right[:3], rtol=1e-4, atol=1e-5)


def test_pissa_goes_through_a_file_and_back():
    """A file holds B A - B0 A0 in one; whoever goes on needs both again, to the bit."""
    adapters = adapted(net(), wish("lora", LAYERS, init="pissa"))
    state = adapters.state()
    file = file_of(adapters)
    assert file.header.rank == {"unet": 8} and file.scale("unet") == 0.5
    again = adapted(net(), wish("lora", LAYERS, init="pissa"), seed=5)
    again.load(file.tensors)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state().items())
    assert again.trained(file.tensors).keys() == again.named_parameters().keys()


def test_what_rests_has_no_gradient_and_what_moves_has():
    """A share of the steps: the number of the last moving step follows from the step alone."""
    adapters = adapted(net(), wish("lora", LAYERS), share=0.5)
    moving = [bool(adapters.moving(step, 7, keep_graph=False)) for step in range(7)]
    assert moving == [True] * 4 + [False] * 3
    assert not any(p.requires_grad for p in adapters.named_parameters().values())
    assert not adapters.moving(6, 7, keep_graph=True)
    assert all(p.requires_grad for p in adapters.named_parameters().values())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (wish("lora", "line("), "adapter.targets='line(' is no regular expression"),
        (wish("lora", "nothing"), "matches none of the 4 layers of unet; the pattern must match a whole name such as"),
        (wish("lora", ".*"), "also matches norm, which is a LayerNorm and no single layer"),
        (wish("lora", LAYERS, blocks=[Block("mid")]), "'mid' is found in none of the 4 targeted layers"),
        (wish("lora", LAYERS, blocks=[Block("[")]), "adapter.blocks='[' is no regular expression"),
        (wish("lora", "everything"), "targets=everything means every weight, norms too, which lora cannot change"),
        (wish("locon", "linear|point"), "holds no convolution, the one thing in which locon differs from lora"),
        (wish("oft", LAYERS), "unet.conv is a 3x3 convolution, which cannot be rotated here"),
        (wish("boft", "linear", rank=3), "has 8 inputs, which blocks of rank=3 do not divide; 2, 4, 8 do"),
        (wish("oft", "linear", blocks=[Block("linear", rank=2)]), "oft has one size for all layers, so blocks"),
        (wish("ia3", "linear", conv=Block("", rank=2)), "ia3 has one size for all layers, so conv_rank or conv_alpha"),
        (wish("ia3", "linear", dropout=0.1), "adapter.dropout=0.1 has no meaning for ia3"),
        (wish("oft", "linear", rank=4, alpha=2), "adapter.alpha=2 has no meaning for oft; leave it out"),
        (wish("lora", "linear", conv=Block("", rank=2)), "conv_rank or conv_alpha is set, but none of the"),
        (wish("loha", "linear", init="pissa"), "adapter.init=pissa has no meaning for loha; it is for lora"),
        (wish("ia3", "linear", lora_plus_ratio=2.0), "adapter.lora_plus_ratio=2.0 has no meaning for ia3"),
        (wish("lora", "linear", factor=4), "adapter.lokr_factor=4 has no meaning for lora; it is for lokr"),
        (wish("dora", "linear", init="olora"), "PEFT defines no dora on top of it"),
        (wish("lora", "linear", init="pissa", dropout=0.1), "set dropout=0"),
        (wish("lora", "linear", init="orthogonal", rank=3), "needs even ranks, and there is 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_its_way_out(asked, expected):
    """Before the base is paid for in time: the field, the value, why, and what to write instead."""
    _, problems = plan(net(), asked)
    assert any(expected in problem for problem in problems), problems


def test_all_problems_are_told_at_once():
    """One attempt, every mistake."""
    _, problems = plan(net(), wish("ia3", "linear", dropout=0.1, init="pissa", blocks=[Block("(", rank=2)]))
    assert len(problems) == 4
