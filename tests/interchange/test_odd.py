"""Whole files whose tensors make no sense are refused in words, layer by layer, before anything is computed."""

from __future__ import annotations

import random

import pytest
import torch

from finetune.families.twins import write_twin
from finetune.interchange.adapter import InterchangeError
from finetune.interchange.commands import convert_adapter, merge_into_base
from finetune.interchange.inspection import inspect_file
from finetune.interchange.names import table_of
from finetune.interchange.reading import read_adapter
from tests.campaigns import fuzz_adapters
from tests.interchange.files import kohya_lora, noise, table, write
from tests.interchange.test_layouts import Q, lycoris

STEM = f"lora_unet_{Q}".replace(".", "_")
SHAPE = table("sd1").shape("unet", Q)
ODD = {
    "a part is missing": ("loha", {"hada_w1_b": None}, "parts that make no loha together"),
    "parts of two methods": ("loha", {"lokr_w1": noise(2, 2)}, "parts that make no loha together"),
    "shapes of two layers": ("loha", {"hada_w2_b": noise(2, 7)}, "shapes do not go together"),
    "nothing in it": ("diff", {"diff": torch.zeros(0, 4)}, "a tensor without numbers"),
    "a number for a matrix": ("lokr", {"lokr_w1": torch.tensor(0.5)}, "without a side"),
    "a bias of another layer": ("diff", {"diff_b": noise(7)}, "changes a weight of"),
    "packed weights": ("lokr", {"lokr_w1": torch.ones(8, 8, dtype=torch.int8)}, "holds whole numbers"),
    "blocks that are not square": ("diag-oft", {"oft_blocks": noise(4, 8, 7)}, "shapes do not go together"),
}
"""What is odd -> (method, parts that differ from a sound file's, what is said of the layer)."""


@pytest.mark.parametrize("kind", sorted(ODD))
def test_parts_that_make_no_update_are_told_with_their_layer(kind, tmp_path):
    """Each of these once ended in a traceback, or in a smaller adapter."""
    method, changed, words = ODD[kind]
    parts = {**lycoris(method, SHAPE), **changed}
    tensors = {f"{STEM}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    path = write(tmp_path / "f.safetensors", tensors)
    with pytest.raises(InterchangeError, match=words) as caught:
        convert_adapter(path, tmp_path / "g.safetensors", to="kohya")
    assert STEM in caught.value.text()
    assert inspect_file(path).kind == "adapter"
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]


def test_an_adapter_of_other_sizes_is_not_merged_into_a_base(tmp_path):
    """As many numbers in another shape would be taken as they come."""
    base = write_twin("sd1", tmp_path / "base")
    names = table_of(base)
    name, shape = next((name, shape) for name, shape in names.networks["unet"].layers.items()
                       if len(shape) == 2 and shape[0] != shape[1])  # fmt: skip
    tensors = kohya_lora({f"lora_unet_{name}".replace(".", "_"): shape[::-1]})
    path = write(tmp_path / "f.safetensors", tensors)
    with pytest.raises(InterchangeError, match="do not fit the base") as caught:
        merge_into_base([str(path)], base, tmp_path / "merged", settings={"how": "concat"})
    assert f"changes a weight of {shape[::-1]}, and the layer's is {shape}" in caught.value.text()
    assert not (tmp_path / "merged").exists()


def test_some_accidents(tmp_path):
    """A few seconds of the campaign: every answer is a result or words, and refusals leave nothing behind."""
    torch.manual_seed(0)
    chance, counts = random.Random(2), fuzz_adapters.Counter()
    base = write_twin("sd1", tmp_path / "base")
    layers = [(name, shape) for name, shape in table_of(base).networks["unet"].layers.items() if shape]
    for number in range(12):
        pair = fuzz_adapters.sound(chance, layers), fuzz_adapters.sound(chance, layers)
        tensors, told = fuzz_adapters.damaged(chance, *pair)
        assert fuzz_adapters.case(chance, tmp_path / str(number), base, tensors, counts), told
    assert any("done" in name for name in counts) and any("refused" in name for name in counts)


def test_a_sound_file_of_every_method_is_read(tmp_path):
    """What the campaign damages must be whole before, or it would try refusals only."""
    torch.manual_seed(0)
    base = write_twin("sd1", tmp_path / "base")
    layers = [(name, shape) for name, shape in table_of(base).networks["unet"].layers.items() if shape]
    for method, (fits, parts) in fuzz_adapters.METHODS.items():
        name, shape = next(layer for layer in layers if fits(layer[1]))
        made = parts(random.Random(0), shape)
        fuzz_adapters.save({f"lora_unet_{name}".replace(".", "_") + f".{part}": t for part, t in made.items()},
                           tmp_path / "f.safetensors")  # fmt: skip
        if method == "glora":
            with pytest.raises(InterchangeError, match="GLoRA"):
                read_adapter(tmp_path / "f.safetensors", base)
        else:
            assert ("unet", name) in read_adapter(tmp_path / "f.safetensors", base).updates
