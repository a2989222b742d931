"""Merging, resizing, extracting, comparing: numbers against the algebra they claim, on files and whole models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.files import AdapterFile
from finetune.errors import ConfigError
from finetune.families import load_family
from finetune.interchange.adapter import InterchangeError
from finetune.interchange.commands import extract_adapter, merge_adapters, merge_into_base, resize_adapter
from finetune.interchange.comparing import diff_adapters
from finetune.interchange.conversion import write as write_adapter
from finetune.interchange.reading import read_adapter
from tests.conftest import command
from tests.interchange.files import kohya_lora, noise, table, write
from tests.tiny import random_adapter

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0"]
CONV = "down_blocks.0.resnets.0.conv1"


def adapter_file(path, shapes, rank=3, alpha=1.5, key=0):
    """A kohya file for some layers of SD1."""
    stems = {f"lora_unet_{module}".replace(".", "_"): shape for module, shape in shapes.items()}
    tensors = kohya_lora(stems, rank, alpha)
    generator = torch.Generator().manual_seed(100 + key)
    return write(path, {name: tensor if name.endswith("alpha") else torch.randn(tensor.shape, generator=generator) * 0.1
                        for name, tensor in tensors.items()})  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    shapes = {module: table("sd1").shape("unet", module) for module in [*MODULES, CONV]}
    return adapter_file(tmp_path / "a.safetensors", shapes), adapter_file(tmp_path / "b.safetensors", shapes, 2, 2.0, 1)


def deltas(path, base=None) -> dict:
    return {place: update.delta().flatten(1) for place, update in read_adapter(path, base).updates.items()}


def test_concat_is_the_exact_weighted_sum(pair, tmp_path):
    """The one way of merging LoRAs that loses nothing; the rank is the sum."""
    merged, _ = merge_adapters([f"{pair[0]}@0.8", f"{pair[1]}@-0.5"], tmp_path / "m.safetensors", settings={})
    first, second, both = deltas(pair[0]), deltas(pair[1]), deltas(tmp_path / "m.safetensors")
    for place, change in both.items():
        assert torch.allclose(change, 0.8 * first[place] - 0.5 * second[place], atol=1e-6)
    assert {update.rank for update in merged.adapter.updates.values()} == {5}
    assert merged.distance < 1e-6


def test_svd_is_the_best_of_its_rank(pair, tmp_path):
    """No matrix of that rank is nearer to the sum (Eckart and Young 1936)."""
    settings = {"how": "svd", "rank": 2}
    merged, _ = merge_adapters([str(pair[0]), str(pair[1])], tmp_path / "m.safetensors", settings=settings)
    first, second, both = deltas(pair[0]), deltas(pair[1]), deltas(tmp_path / "m.safetensors")
    lost = whole = 0.0
    for place, change in both.items():
        exact = first[place] + second[place]
        values = torch.linalg.svdvals(exact)
        assert float((exact - change).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-3)
        lost, whole = lost + float(values[2:].square().sum()), whole + float(values.square().sum())
    assert merged.distance == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_two_halves_of_one_adapter_are_the_adapter(pair, tmp_path):
    """Whatever the way of merging (but for dropping at random), a thing merged with itself is itself."""
    itself = deltas(pair[0])
    for how in ("concat", "svd", "linear", "ties"):
        density = 1.0
        merge_adapters([f"{pair[0]}@0.5", f"{pair[0]}@0.5"], tmp_path / f"{how}.safetensors",
                       settings={"how": how, "density": density})  # fmt: skip
        factor = 0.5 if how == "ties" else 1.0  # TIES averages what agrees, so weights of one half stay a half.
        for place, change in deltas(tmp_path / f"{how}.safetensors").items():
            assert torch.allclose(change, factor * itself[place], atol=1e-6), how


def test_dare_is_right_on_average_and_repeatable(pair, tmp_path):
    """Dropped values are made up for by the rest; the same seed drops the same ones."""
    settings = {"how": "dare", "density": 0.5, "seed": 3, "rank": 3}
    for name in ("1", "2"):
        merge_adapters([str(pair[0]), str(pair[1])], tmp_path / f"{name}.safetensors", settings=settings)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    from finetune.interchange.merging import Part, Settings, dense_dare, dense_sum

    updates = [read_adapter(path).updates["unet", MODULES[0]] for path in pair]
    parts = [Part(update, 1.0) for update in updates]
    mean = torch.stack([dense_dare(parts, Settings(seed=seed), ("unet", "x")) for seed in range(60)]).mean(dim=0)
    exact = dense_sum(parts)
    assert float((mean - exact).norm() / exact.norm()) < 0.2


def test_ties_follows_its_paper():
    """Trim, elect, average: a case worked out by hand."""
    from finetune.interchange.adapter import Update
    from finetune.interchange.merging import Part, Settings, dense_ties

    rows = [torch.tensor([[4.0, -1.0, 0.1, 2.0]]), torch.tensor([[2.0, 3.0, -0.2, -3.0]])]
    parts = [Part(Update("diff", {"diff": row}), 1.0) for row in rows]
    # Half of the values stay: 4 and 2; 3 and -3. Signs of the sums: +, +, 0, -.
    assert dense_ties(parts, Settings(density=0.5), ("", "")).tolist() == [[4.0, 3.0, 0.0, -3.0]]


@pytest.mark.parametrize(("share", "value"), [("energy", 0.9), ("frobenius", 0.95), ("ratio", 4.0)])
def test_resizing_keeps_what_it_promises(share, value, pair, tmp_path):
    """The rank is the smallest that keeps the share; the figure is the share that is really left."""
    resized, _ = resize_adapter(pair[0], tmp_path / "r.safetensors", shares={share: value})
    before, after = deltas(pair[0]), read_adapter(tmp_path / "r.safetensors").updates
    for place, update in after.items():
        values = torch.linalg.svdvals(before[place].double())[:3]
        rules = {
            "energy": lambda n, v=values: v[:n].square().sum() >= 0.9 * v.square().sum() - 1e-9,
            "frobenius": lambda n, v=values: v[:n].norm() >= 0.95 * v.norm() - 1e-9,
            "ratio": lambda n, v=values: n >= int((v * 4.0 >= v[0]).sum()),
        }
        assert update.rank == next(n for n in (1, 2, 3) if rules[share](n))
    lost = sum(float((before[place] - after[place].delta().flatten(1)).square().sum()) for place in before)
    whole = sum(float(change.square().sum()) for change in before.values())
    assert resized.kept == pytest.approx((1 - lost / whole) ** 0.5, abs=1e-6)


def test_growing_the_rank_changes_nothing(pair, tmp_path):
    """There is nothing to invent beyond the rank an update has."""
    resize_adapter(pair[0], tmp_path / "r.safetensors", rank=64)
    before = deltas(pair[0])
    for place, change in deltas(tmp_path / "r.safetensors").items():
        assert torch.allclose(change, before[place], atol=1e-6)


@pytest.fixture
def tuned(tiny_base, tmp_path):
    """A copy of the base with known changes of rank 2, and an adapter file that says the same."""
    folder = tmp_path / "tuned"
    shutil.copytree(tiny_base, folder)
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    shapes = {module: tuple(tensors[f"{module}.weight"].shape) for module in [*MODULES, CONV]}
    adapter = adapter_file(tmp_path / "known.safetensors", shapes, rank=2, alpha=2.0)
    for (_, module), update in read_adapter(adapter, tiny_base).updates.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + update.delta()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder, adapter


def test_extraction_finds_what_was_put_in(tuned, tiny_base, tmp_path):
    """A difference of rank 2 comes back as a LoRA of rank 2, of the changed layers and no others."""
    found, _ = extract_adapter(tuned[0], tiny_base, tmp_path / "e.safetensors", rank=2, dtype="fp32")
    expected, extracted = deltas(tuned[1], tiny_base), deltas(tmp_path / "e.safetensors", tiny_base)
    assert set(extracted) == set(expected)
    for place, change in extracted.items():
        assert torch.allclose(change, expected[place], atol=1e-5)
    assert found.kept == pytest.approx(1.0, abs=1e-6)
    energetic, _ = extract_adapter(tuned[0], tiny_base, tmp_path / "f.safetensors", shares={"energy": 0.999})
    assert max(max(counts) for counts in energetic.ranks.values()) == 2


def test_equal_models_hold_nothing_to_extract(tiny_base, tmp_path):
    """An empty adapter would look like a result."""
    with pytest.raises(InterchangeError, match="same weights"):
        extract_adapter(tiny_base, tiny_base, tmp_path / "e.safetensors")


def test_merging_into_a_base_is_the_extraction_backwards(tuned, tiny_base, tmp_path):
    """Base plus adapter must be the tuned model, tensor by tensor, and nothing else may change by a bit."""
    done = merge_into_base([str(tuned[1])], tiny_base, tmp_path / "merged", settings={"how": "concat"})
    assert done.layers == len(MODULES) + 1 and done.lost < 1e-3
    for source in sorted(tuned[0].rglob("*")):
        copy = tmp_path / "merged" / source.relative_to(tuned[0])
        if source.suffix == ".safetensors":
            wanted, found = load_file(source), load_file(copy)
            assert wanted.keys() == found.keys()
            for name, tensor in wanted.items():
                changed = name.removesuffix(".weight") in [*MODULES, CONV]
                assert torch.allclose(found[name], tensor, atol=1e-6 if changed else 0.0, rtol=0.0), name
        elif source.is_file():
            assert copy.read_bytes() == source.read_bytes()


def test_a_merge_that_rounding_would_swallow_is_refused(tuned, tiny_base, tmp_path):
    """bf16 has eight bits: a weak adapter is gone after one rounding, and the model looks untouched."""
    base = tmp_path / "bf16"
    shutil.copytree(tiny_base, base)
    file = next((base / "unet").glob("*.safetensors"))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(InterchangeError, match=r"Rounding would take(.|\n)*--dtype fp32"):
        merge_into_base([f"{tuned[1]}@0.005"], base, tmp_path / "m", settings={"how": "concat"})
    assert not (tmp_path / "m").exists()
    merge_into_base([f"{tuned[1]}@0.005"], base, tmp_path / "m", settings={"how": "concat"}, force=True)
    assert (tmp_path / "m" / "model_index.json").is_file()


def test_a_merge_can_be_written_in_another_number_format(tuned, tiny_base, tmp_path, capsys, monkeypatch):
    """What a refusal advises must work: in fp32 nothing is lost, in bf16 everything is bf16, positions stay numbers.

    A file that is called fp16 and holds fp32 would be looked for in vain, so the name goes with the format.
    """
    base = tmp_path / "fp16"
    shutil.copytree(tiny_base, base)
    file = next((base / "unet").glob("*.safetensors"))
    weights = {name: tensor.half() for name, tensor in load_file(file).items()} | {"position_ids": torch.arange(7)}
    save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    file.unlink()
    config = base / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    for name, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        target = tmp_path / name
        asked = ("merge", f"{tuned[1]}@0.5", "--into", base, "-o", target, "--dtype", name, "--force")
        command(capsys, monkeypatch, *asked)
        found = load_file(target / "unet" / file.name)
        assert torch.equal(found.pop("position_ids"), torch.arange(7))
        assert {tensor.dtype for tensor in found.values()} == {wanted}
        change = deltas(tuned[1])["unet", MODULES[0]]
        exact = weights[f"{MODULES[0]}.weight"].float() + 0.5 * change
        assert torch.allclose(found[f"{MODULES[0]}.weight"].float(), exact.to(wanted).float(), atol=1e-6)
        told = json.loads((target / "text_encoder" / "config.json").read_text())["dtype"]
        assert told == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize("how", ["ties", "dare", "svd"])
def test_every_way_of_merging_takes_methods_that_need_the_base(how, tiny_base, tmp_path):
    """With the base at hand DoRA and IA3 are changes like others: they are trimmed or dropped too, not just added."""
    from finetune.interchange.adapter import Adapter, Update
    from finetune.interchange.merging import DENSE, Part, Settings
    from finetune.interchange.names import from_base

    place, file = ("unet", MODULES[0]), next((tiny_base / "unet").glob("*.safetensors"))
    weight = load_file(file)[f"{MODULES[0]}.weight"]
    rows, columns = weight.shape
    dora = {"lora_A.weight": noise(2, columns), "lora_B.weight": noise(rows, 2),
            "lora_magnitude_vector": 1.2 * weight.norm(dim=1)}  # fmt: skip
    updates = [Update("dora", dora), Update("ia3", {"ia3_l": 1 + noise(1, columns)})]
    paths = []
    for number, update in enumerate(updates):
        paths.append(tmp_path / f"{number}.safetensors")
        write_adapter(Adapter({place: update}, from_base(tiny_base)), paths[-1], to="ours", base=tiny_base)
    settings = {"how": how, "density": 0.3, "seed": 5}
    merge_into_base([f"{paths[0]}@0.7", str(paths[1])], tiny_base, tmp_path / "m", settings=settings)
    found = load_file(tmp_path / "m" / "unet" / file.name)[f"{MODULES[0]}.weight"]
    changes = [Update("diff", {"diff": update.delta(weight)}) for update in updates]
    parts = [Part(changes[0], 0.7), Part(changes[1], 1.0)]
    expected = DENSE[how](parts, Settings(density=0.3, seed=5), place)
    plain = 0.7 * changes[0].delta() + changes[1].delta()
    assert torch.allclose(found, weight + expected, atol=1e-6)
    assert (how == "svd") == torch.allclose(expected, plain, atol=1e-6)


def test_diff_knows_angles_and_lengths(pair, tmp_path):
    """An adapter against twice itself: the same direction, twice the length; against a stranger: neither."""
    merge_adapters([f"{pair[0]}@2"], tmp_path / "twice.safetensors", settings={})
    twice = diff_adapters(pair[0], tmp_path / "twice.safetensors")
    assert twice.cosine == pytest.approx(1.0) and twice.ratio == pytest.approx(2.0)
    stranger = diff_adapters(pair[0], pair[1])
    assert abs(stranger.cosine) < 0.1
    first, second = deltas(pair[0]), deltas(pair[1])
    sums = [
        sum(float((a[p] * b[p]).sum()) for p in first) for a, b in ((first, second), (first, first), (second, second))
    ]
    assert stranger.cosine == pytest.approx(sums[0] / (sums[1] * sums[2]) ** 0.5, abs=1e-6)
    assert [row.block for row in stranger.blocks] == ["down_blocks.0"]


def test_wrong_requests_are_answered_in_words(pair, tmp_path, capsys, monkeypatch):
    """Each with what was given and what would do."""
    out = tmp_path / "o.safetensors"
    cases = {
        ("merge", pair[0], f"{pair[1]}@much", "-o", out): ("much", 2),
        ("merge", pair[0], pair[1], "-o", out, "--how", "tie"): ("did you mean ties", 2),
        ("merge", pair[0], "-o", pair[0]): ("one of the sources", 2),
        ("resize", pair[0], out): ("give --rank", 2),
        ("resize", pair[0], out, "--energy", "3"): ("share between 0 and 1", 2),
        ("convert", pair[0], out, "--to", "kohia"): ("did you mean kohya", 2),
        ("convert", tmp_path / "none.safetensors", out, "--to", "kohya"): ("cannot be read", 4),
        ("convert", pair[0], tmp_path / "o.bin", "--to", "kohya"): (".safetensors", 2),
        ("diff", pair[0], tmp_path): ("contains no adapter", 2),
        ("extract", tmp_path / "x", tmp_path / "y", out): ("cannot be read", 4),
    }
    for arguments, (words, code) in cases.items():
        assert words in command(capsys, monkeypatch, *arguments, expect=code)
    assert not out.exists()


def test_the_commands_work_from_end_to_end(pair, tuned, tiny_base, tmp_path, capsys, monkeypatch):
    """What the help promises, typed as a user types it."""
    out = tmp_path / "o.safetensors"
    assert "the same" in command(capsys, monkeypatch, "merge", f"{pair[0]}@0.5", pair[1], "-o", out)
    assert "Kept" in command(capsys, monkeypatch, "resize", out, tmp_path / "r.safetensors", "--rank", 2)
    assert "down_blocks.0" in command(capsys, monkeypatch, "diff", pair[0], out)
    assert json.loads(command(capsys, monkeypatch, "diff", pair[0], pair[0], "--json"))["cosine"] == pytest.approx(1.0)
    assert "Kept" in command(
        capsys, monkeypatch, "extract", tuned[0], tiny_base, tmp_path / "e.safetensors", "--rank", 2
    )
    assert "3 weights" in command(
        capsys, monkeypatch, "merge", tmp_path / "e.safetensors", "--into", tiny_base, "-o", tmp_path / "new"
    )
    assert "Loads in" in command(capsys, monkeypatch, "inspect", out)
    with pytest.raises(ConfigError):
        merge_adapters([str(pair[0])], out, settings={"how": "svd", "rank": -1})


@pytest.fixture(scope="module")
def demo_adapter(tmp_path_factory):
    """An adapter of the embedded base, whose layers are smaller than those of any published model."""
    family, parts = load_family("demo")
    made = random_adapter(family, parts, rank={"unet": 4}, alpha={"unet": 4.0}, preset="attention", strength=0.3)
    path = tmp_path_factory.mktemp("demo") / "a.safetensors"
    made.save(path)
    return path


def test_the_embedded_base_goes_by_its_name_as_in_a_run(demo_adapter, tmp_path, capsys, monkeypatch):
    """`demo` is a base wherever one is named; a tool that looks for a file of that name helps nobody."""
    command(capsys, monkeypatch, "merge", demo_adapter, "--into", "demo", "-o", tmp_path / "merged")
    found = tmp_path / "e.safetensors"
    command(capsys, monkeypatch, "extract", tmp_path / "merged", "demo", found, "--rank", 4, "--base", "demo")
    facts = json.loads(command(capsys, monkeypatch, "inspect", found, "--base", "demo", "--json"))
    assert facts["family"] == "sd1" and facts["unknown"] == [] and facts["methods"]["unet"]["lora"] > 10


def test_adapters_of_the_embedded_base_name_it_themselves(demo_adapter, tmp_path, capsys, monkeypatch):
    """The first adapters that anybody makes here are merged, resized and inspected without a word about the base."""
    merged, small = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    command(capsys, monkeypatch, "merge", f"{demo_adapter}@0.5", demo_adapter, "-o", merged)
    command(capsys, monkeypatch, "resize", merged, small, "--rank", 2)
    assert "the embedded base model" in command(capsys, monkeypatch, "inspect", small)
    assert {update.rank for update in read_adapter(small).updates.values()} == {2}


def test_no_spelling_is_guessed_for_a_base_of_no_published_size(demo_adapter, tmp_path, capsys, monkeypatch):
    """Names of the nearest published base would be written, and every reader would say "key not loaded"."""
    file = AdapterFile.read(demo_adapter)
    unnamed, target = tmp_path / "a.safetensors", tmp_path / "k.safetensors"
    AdapterFile(file.tensors, replace(file.header, base="mine")).save(unnamed)
    text = command(capsys, monkeypatch, "convert", unnamed, target, "--to", "kohya", expect=2)
    assert "not a published model" in text and "--base" in text and not target.exists()
    command(capsys, monkeypatch, "convert", unnamed, target, "--to", "kohya", "--base", "demo")
    assert all(name.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for name in load_file(target))
    command(capsys, monkeypatch, "convert", target, tmp_path / "d.safetensors", "--to", "diffusers")
