"""What `--allow-lossy` costs is measured, told, and written into the file, for every way of losing something."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from finetune.interchange.adapter import Adapter, InterchangeError, Update
from finetune.interchange.commands import convert_adapter, merge_adapters
from finetune.interchange.conversion import write
from finetune.interchange.lossy import LOSSES
from finetune.interchange.names import from_base
from finetune.interchange.reading import read_adapter
from finetune.interchange.weights import open_weights
from tests.conftest import command
from tests.interchange.files import noise

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
VALUE = QUERY.replace("to_q", "to_v")


def noted(path) -> list[dict]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[LOSSES])


def loha(base, *modules: str) -> Adapter:
    architecture = from_base(base)
    updates = {}
    for number, module in enumerate(modules):
        rows, columns = architecture.networks["unet"].layers[module]
        shapes = {"hada_w1_a": (rows, 3), "hada_w1_b": (3, columns), "hada_w2_a": (rows, 3), "hada_w2_b": (3, columns)}
        factors = {name: noise(*shape, key=10 * number + key) for key, (name, shape) in enumerate(shapes.items())}
        updates["unet", module] = Update("loha", factors, 0.7)
    return Adapter(updates, architecture)


def dora(base) -> Adapter:
    architecture = from_base(base)
    with open_weights(base) as weights:
        norms = weights.weight(("unet", QUERY)).norm(dim=1)
    rows, columns = architecture.networks["unet"].layers[QUERY]
    tensors = {"lora_A.weight": noise(2, columns), "lora_B.weight": noise(rows, 2),
               "lora_magnitude_vector": norms * (1 + noise(rows).abs())}  # fmt: skip
    return Adapter({("unet", QUERY): Update("dora", tensors, 0.5)}, architecture)


def test_a_rank_costs_what_the_singular_values_say(tiny_base, tmp_path):
    """A LoHa as a LoRA of small rank: the figures must be those of the best approximation, layer by layer."""
    adapter = loha(tiny_base, QUERY, VALUE)
    path = tmp_path / "l.safetensors"
    with pytest.raises(InterchangeError, match="load_lora_weights reads only LoRA"):
        write(adapter, path, to="diffusers", base=tiny_base)
    for rank in (2, 5):
        done = write(adapter, path, to="diffusers", base=tiny_base, allow_lossy=True, rank=rank)
        shares = []
        for module in (QUERY, VALUE):
            values = torch.linalg.svdvals(adapter.updates["unet", module].delta().double())
            shares.append(float((values[rank:].square().sum() / values.square().sum()).sqrt()))
        (loss,) = noted(path)
        assert loss["layers"] == 2 and loss["worst"] == pytest.approx(max(shares), rel=1e-4)
        assert loss["mean"] == pytest.approx(sum(shares) / 2, rel=1e-4)
        assert loss["worst_layer"] == f"unet.{(QUERY, VALUE)[shares[1] > shares[0]]}"
        assert f"mean {loss['mean']:.2%}" in dict(done.rows())[f"Lost, as a LoRA of rank {rank}"]
    # A product of two rank-3 matrices, element by element, has at most rank 9.
    write(adapter, path, to="diffusers", base=tiny_base, allow_lossy=True, rank=9)
    assert noted(path)[0]["worst"] < 1e-5


def test_a_bias_that_is_left_out_counts(tiny_base, tmp_path):
    """What a layout has no words for is lost whole, and must not vanish from the figures."""
    adapter = loha(tiny_base, QUERY)
    update = adapter.updates["unet", QUERY]
    bias = noise(update.delta().shape[0], size=3.0)
    adapter.updates["unet", QUERY] = Update("loha", {**update.tensors, "diff_b": bias}, update.scale)
    done = write(adapter, tmp_path / "l.safetensors", to="diffusers", base=tiny_base, allow_lossy=True, rank=9)
    share = float(bias.norm()) / float((update.delta().square().sum() + bias.square().sum()).sqrt())
    assert noted(tmp_path / "l.safetensors")[0]["worst"] == pytest.approx(share, rel=1e-4)
    assert any("of 1 bias are left out" in note for note in done.notes)


def test_dora_in_a_kohya_file_costs_what_its_readers_make_of_it(tiny_base, tmp_path):
    """The keys are LyCORIS' and exact for it; what ComfyUI and A1111 compute instead is written out here."""
    adapter = dora(tiny_base)
    update = adapter.updates["unet", QUERY]
    write(adapter, tmp_path / "d.safetensors", to="kohya", base=tiny_base, allow_lossy=True)
    with open_weights(tiny_base) as weights:
        weight = weights.weight(("unet", QUERY))
    moved = weight + 0.5 * update.tensors["lora_B.weight"] @ update.tensors["lora_A.weight"]
    magnitude = update.tensors["lora_magnitude_vector"][:, None]
    right = magnitude * moved / moved.norm(dim=1, keepdim=True)
    comfy = magnitude * moved / weight.norm(dim=1, keepdim=True)
    a1111 = magnitude * moved / moved.norm(dim=0, keepdim=True)
    found = {loss["cause"].split()[1]: loss for loss in noted(tmp_path / "d.safetensors")}
    for reader, theirs in (("ComfyUI", comfy), ("A1111", a1111)):
        expected = float((theirs - right).norm() / (right - weight).norm())
        assert found[reader]["worst"] == pytest.approx(expected, rel=1e-4), reader
    assert found["ComfyUI"]["worst"] < found["A1111"]["worst"]


def test_a_file_remembers_every_loss(tiny_base, tmp_path):
    """A second conversion is exact, and yet the numbers are still an approximation of what was trained."""
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(loha(tiny_base, QUERY), first, to="diffusers", base=tiny_base, allow_lossy=True, rank=2)
    convert_adapter(first, second, to="kohya", base=tiny_base)
    assert noted(second) == noted(first)


def test_a_merged_file_remembers_what_its_parts_lost(tiny_base, tmp_path):
    """An exact sum of an approximation is still one, and says which part it was; its own loss comes last."""
    lossy, exact, both = (tmp_path / f"{name}.safetensors" for name in ("lossy", "exact", "both"))
    write(loha(tiny_base, QUERY), lossy, to="diffusers", base=tiny_base, allow_lossy=True, rank=2)
    architecture = from_base(tiny_base)
    rows, columns = architecture.networks["unet"].layers[VALUE]
    factors = {"lora_A.weight": noise(2, columns), "lora_B.weight": noise(rows, 2)}
    write(Adapter({("unet", VALUE): Update("lora", factors)}, architecture), exact, to="diffusers", base=tiny_base)
    told = [{"of": "lossy.safetensors", **note} for note in noted(lossy)]
    merge_adapters([str(lossy), f"{exact}@0.5"], both, settings={}, to="diffusers", base=tiny_base)
    assert noted(both) == told
    merge_adapters([str(lossy), str(exact)], both, settings={"how": "svd", "rank": 1}, to="diffusers", base=tiny_base)
    assert noted(both)[:-1] == told and noted(both)[-1]["cause"].startswith("merged by svd")


def test_strength_of_a_whole_lokr_goes_into_its_factor(tiny_base, tmp_path):
    """Kohya's readers ignore alpha there, and a factor can take it exactly: nothing to refuse, nothing to lose."""
    architecture = from_base(tiny_base)
    rows, columns = architecture.networks["unet"].layers[QUERY]
    factors = {"lokr_w1": noise(4, 4), "lokr_w2": noise(rows // 4, columns // 4)}
    adapter = Adapter({("unet", QUERY): Update("lokr", factors, 0.3)}, architecture)
    done = write(adapter, tmp_path / "k.safetensors", to="kohya", base=tiny_base)
    back = read_adapter(tmp_path / "k.safetensors", tiny_base).updates["unet", QUERY]
    assert not done.losses and back.scale == 1.0
    assert torch.allclose(back.delta(), adapter.updates["unet", QUERY].delta(), atol=1e-7)


def test_the_command_line_tells_the_loss(tiny_base, tmp_path, capsys, monkeypatch):
    """Whoever asks for a lossy file reads what it costs, and without the base that it is needed to say so."""
    source, target = tmp_path / "d.safetensors", tmp_path / "k.safetensors"
    write(dora(tiny_base), source, to="diffusers", base=tiny_base)
    words = ("convert", source, target, "--to", "kohya", "--allow-lossy")
    said = command(capsys, monkeypatch, *words, "--base", tiny_base)
    assert "as ComfyUI and Forge read DoRA" in said and "mean" in said
