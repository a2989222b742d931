"""Single-file checkpoints: extracted from and merged into like folders, whatever their layout fuses or turns round."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ConfigError
from finetune.families import FAMILIES, load_family
from finetune.families.original_keys import to_original
from finetune.interchange.adapter import Adapter, Update
from finetune.interchange.commands import extract_adapter, merge_into_base
from finetune.interchange.conversion import write
from finetune.interchange.names import canonical_module, from_base
from finetune.interchange.reading import read_adapter
from finetune.storage import write_safetensors
from tests.conftest import command
from tests.interchange.files import lora
from tests.tiny import BUILDERS

NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("sd1", "sdxl_refiner"))) for name in sorted(FAMILIES)]
"""Families; those whose layouts are parts of the others' run with the slow tests."""
WORDS = {
    "unet": ("attn1.to_q", "attn2.to_v", "conv1", "conv2", "time_emb_proj", "upsamplers.0.conv", "proj_in"),
    "transformer": ("attn.to_q", "attn.to_v", "norm_out.linear", "proj_mlp", "ff.net.2", "norm1_context.linear"),
    "text_encoder": ("self_attn.k_proj", "self_attn.v_proj", "mlp.fc1", ".wo", ".q"),
}
ENDS = {"text_encoder_2": ("text_projection",)}


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(family, base folder, tuned folder, both as single files, adapter file that is the difference)."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """The same for the family that fuses and turns round most."""
    return made("sdxl", tmp_path_factory.mktemp("sdxl"))


def made(family, folder):
    base = BUILDERS[family](folder / "base")
    architecture = from_base(base)
    updates = {}
    for component, network in architecture.networks.items():
        endings = WORDS[component.rstrip("_23")] + (ENDS.get(component, ()) if family == "sdxl" else ())
        chosen = [module for module in network.layers if module.endswith(endings)]
        for number, module in enumerate(chosen):
            factors = lora(network.layers[module], 2, number)
            tensors = {"lora_A.weight": factors["A"], "lora_B.weight": factors["B"]}
            updates[component, module] = Update("lora", tensors, 0.5)
    adapter = Adapter(updates, architecture)
    write(adapter, folder / "adapter.safetensors", to="ours", base=base)
    shutil.copytree(base, folder / "tuned")
    add(folder / "tuned", adapter)
    return family, base, folder / "tuned", single(base), single(folder / "tuned"), folder / "adapter.safetensors"


def add(folder, adapter) -> None:
    """The adapter's changes in the weights of a pipeline folder, without our merging."""
    for component in adapter.components():
        for file in (folder / component).glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                module = canonical_module(component, name.removesuffix(".weight"))
                if (component, module) in adapter.updates:
                    change = adapter.updates[component, module].delta()
                    tensors[name] = tensors[name] + change.reshape(tensors[name].shape)
            save_file(tensors, file, metadata={"format": "pt"})


def single(folder):
    """A pipeline folder as a single file, by the name tables that loading uses and interchange does not."""
    family, components = load_family(str(folder))
    named, tensors = components.modules(), {}
    for component, layout in family.original.items():
        module = named["denoiser" if component == family.denoiser else component]
        tensors |= to_original(layout, component, module, module.state_dict())
    path = folder.parent / f"{folder.name}.safetensors"
    write_safetensors(path, tensors, {})
    return path


def assert_same_model(found, wanted) -> None:
    ours, theirs = load_file(found), load_file(wanted)
    assert ours.keys() == theirs.keys()
    far = [name for name, tensor in theirs.items() if not torch.allclose(ours[name], tensor, atol=2e-6, rtol=0)]
    assert not far


def test_merging_into_a_single_file_is_the_tuned_single_file(case, tmp_path):
    """Fused qkv, OpenCLIP's in_proj and turned projection, swapped halves: the file must be that of the tuned model."""
    _, base, _, base_file, tuned_file, adapter = case
    merge_into_base([str(adapter)], base_file, tmp_path / "m.safetensors", settings={"how": "concat"}, base=base)
    assert_same_model(tmp_path / "m.safetensors", tuned_file)


def test_extracting_finds_the_same_in_files_and_folders(case, tmp_path):
    """From two single files, and from a file and a folder, comes the adapter that was put in."""
    _, base, tuned, base_file, tuned_file, adapter = case
    wanted = read_adapter(adapter, base).updates
    for number, (new, old) in enumerate([(tuned_file, base_file), (tuned, base_file)]):
        out = tmp_path / f"{number}.safetensors"
        extract_adapter(new, old, out, rank=2, dtype="fp32", base=base, to="ours")
        found = read_adapter(out, base).updates
        assert found.keys() == wanted.keys()
        for place, update in found.items():
            assert torch.allclose(update.delta().flatten(1), wanted[place].delta().flatten(1), atol=1e-5), place


def test_a_single_file_of_other_sizes_asks_for_its_names(case, tmp_path):
    """Rows of a fused layer cut by a published model's sizes would be other layers' rows."""
    _, _, _, base_file, tuned_file, _ = case
    with pytest.raises(ConfigError, match=r"--base|not a known model"):
        extract_adapter(tuned_file, base_file, tmp_path / "e.safetensors", rank=2)


def test_biases_that_differ_are_told_across_layouts(sdxl, tmp_path):
    """A LoRA has no biases; that they differ must be said whichever way the two models are stored."""
    _, _, tuned, base_file, _, _ = sdxl
    moved = tmp_path / "moved"
    shutil.copytree(tuned, moved)
    file = next((moved / "text_encoder_2").glob("*.safetensors"))
    tensors = load_file(file)
    bias = next(key for key in tensors if key.endswith("self_attn.k_proj.bias"))
    save_file(tensors | {bias: tensors[bias] + 1}, file, metadata={"format": "pt"})
    target = tmp_path / "e.safetensors"
    done, _ = extract_adapter(moved, base_file, target, rank=2, to="ours", components=("text_encoder_2",))
    assert any(note.endswith(": 1 bias.") for note in done.notes)


def test_the_command_line_takes_single_files(sdxl, tmp_path, capsys, monkeypatch):
    """What a user of A1111 has is single files."""
    _, base, _, base_file, tuned_file, adapter = sdxl
    said = command(capsys, monkeypatch, "extract", tuned_file, base_file, tmp_path / "e.safetensors", "--rank", 2,
                   "--base", base, "--dtype", "fp32", "--network", "text_encoder_2")  # fmt: skip
    assert "100.00%" in said
    target = tmp_path / "m.safetensors"
    command(capsys, monkeypatch, "merge", adapter, "--into", base_file, "-o", target, "--base", base)
    assert target.is_file()
    said = command(capsys, monkeypatch, "merge", adapter, "--into", base_file, "-o", tmp_path / "n.safetensors",
                   "--base", base, "--to", "peft", "--rank", 4, expect=2)  # fmt: skip
    assert "--to and --rank cannot be used" in said
