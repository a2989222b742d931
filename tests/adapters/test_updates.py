"""The formulas are what the trained layers compute, and what PEFT itself merges."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import OFTConfig, inject_adapter_in_model
from torch import nn

from finetune.adapters import UPDATES, merged_bias, merged_weight
from finetune.adapters.updates import per_output
from tests.adapters.nets import LAYERS, SMALL, adapted, disturb, file_of, inputs, net, wish

CASES = [
    *[(method, LAYERS, {}) for method in ("lora", "rslora", "locon", "dora", "loha", "lokr", "ia3", "full")],
    *[(method, LAYERS, {"tucker": True}) for method in ("loha", "lokr")],
    ("lokr", LAYERS, {"factor": 2}),
    *[(method, SMALL, {}) for method in ("oft", "boft")],
    *[("lora", LAYERS, {"init": init}) for init in ("gaussian", "orthogonal", "pissa", "olora")],
    ("rslora", LAYERS, {"init": "pissa"}),
]


def merged_net(file):
    """A fresh net with every weight and bias replaced by what the formulas say."""
    module = net()
    with torch.no_grad():
        for (component, name), tensors in file.layers().items():
            layer, method = module.get_submodule(name), file.header.method[component]
            weight, bias = layer.weight, layer.bias
            weight.copy_(merged_weight(method, tensors, weight, file.scale(component, name), file.header.options))
            if bias is not None:
                bias.copy_(merged_bias(method, tensors, bias))
    return module


@pytest.mark.parametrize(("method", "pattern", "extra"), CASES)
def test_the_formula_is_what_the_live_layer_computes(method, pattern, extra):
    """Linear, strided, 3x3 and 1x1 layers: an exported file must mean what was trained."""
    live = net()
    adapters = disturb(adapted(live, wish(method, pattern, **extra)))
    file = file_of(adapters)
    assert file.problems() == []
    torch.testing.assert_close(merged_net(file)(*inputs()), live(*inputs()), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(live(*inputs()), net()(*inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "pattern", "extra"), [case for case in CASES if case[0] != "full"])
def test_the_formula_is_what_peft_merges(method, pattern, extra):
    """Two statements of one method, written apart, must agree weight by weight."""
    live = net()
    adapters = disturb(adapted(live, wish(method, pattern, **extra)))
    ours = merged_net(file_of(adapters))
    for name in file_of(adapters).layers():
        layer = live.get_submodule(name[1])
        layer.merge()
        torch.testing.assert_close(
            layer.get_base_layer().weight, ours.get_submodule(name[1]).weight, rtol=1e-4, atol=1e-5
        )


def test_files_of_pefts_own_oft_need_the_number_of_terms():
    """PEFT cuts the Cayley transform's series after five terms; ours is exact, and the option tells them apart."""
    live = nn.Sequential(nn.Linear(8, 6))
    inject_adapter_in_model(OFTConfig(oft_block_size=4, target_modules=["0"]), live)
    with torch.no_grad():
        live[0].oft_R["default"].weight.normal_(std=0.3)
    tensors = {"oft_R.weight": live[0].oft_R["default"].weight.detach()}
    weight = live[0].get_base_layer().weight
    wanted = copy.deepcopy(live)[0]
    wanted.merge()
    series = merged_weight("oft", tensors, weight, 1.0, {"cayley_terms": 5})
    exact = merged_weight("oft", tensors, weight, 1.0, {})
    torch.testing.assert_close(series, wanted.get_base_layer().weight, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(series, exact, atol=1e-3)
    torch.testing.assert_close(exact @ exact.T, weight @ weight.T, rtol=1e-4, atol=1e-5)


def test_gains_of_outputs_scale_the_bias_too():
    """Files of other programs hold (IA)^3 gains per output; then the bias is part of what is scaled."""
    layer, gains = nn.Linear(3, 4), torch.rand(4, 1)
    assert per_output(gains)
    rows = torch.randn(2, 3)
    weight = merged_weight("ia3", {"ia3_l": gains}, layer.weight, 1.0, {})
    bias = merged_bias("ia3", {"ia3_l": gains}, layer.bias)
    torch.testing.assert_close(nn.functional.linear(rows, weight, bias), layer(rows) * gains.T)


def test_half_precision_is_widened_and_double_kept():
    """A merge computed in half precision would round a small update away."""
    tensors = {"lora_A.weight": torch.randn(2, 3), "lora_B.weight": torch.randn(4, 2)}
    assert merged_weight("lora", tensors, torch.randn(4, 3).bfloat16(), 1.0, {}).dtype == torch.float32
    assert merged_weight("lora", tensors, torch.randn(4, 3).double(), 1.0, {}).dtype == torch.float64


def test_every_layout_is_reached():
    """A layout that no test computes could mean anything."""
    reached = {method: set() for method in UPDATES}
    thin = [("lokr", LAYERS, {"rank": 1}), ("lokr", LAYERS, {"rank": 1, "tucker": True})]
    for method, pattern, extra in [*CASES, *thin]:
        for tensors in file_of(adapted(net(), wish(method, pattern, **extra))).layers().values():
            reached[method].add(frozenset(tensors))
    assert all(reached[m] <= set(u.layouts) for m, u in UPDATES.items() if u.layouts)
    # PEFT never takes lokr's left factor apart unless asked to; files of LyCORIS do.
    missing = {m: set(u.layouts) - reached[m] for m, u in UPDATES.items()}
    assert {m for m, left in missing.items() if left} == {"lokr"}
    assert all("lokr_w1_a" in layout for layout in missing["lokr"])


def test_lokr_left_factor_may_be_two_matrices():
    """LyCORIS' decompose_both: the product of the two is the factor."""
    first, second, right = torch.randn(2, 1), torch.randn(1, 3), torch.randn(4, 5)
    apart = merged_weight(
        "lokr", {"lokr_w1_a": first, "lokr_w1_b": second, "lokr_w2": right}, torch.zeros(8, 15), 0.5, {}
    )
    whole = merged_weight("lokr", {"lokr_w1": first @ second, "lokr_w2": right}, torch.zeros(8, 15), 0.5, {})
    torch.testing.assert_close(apart, whole)
    torch.testing.assert_close(whole, 0.5 * torch.kron(first @ second, right))
