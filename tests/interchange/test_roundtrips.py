"""Files are read by diffusers and PEFT themselves, and come back from every layout as they went in."""

from __future__ import annotations

import re

import diffusers
import peft
import pytest
import torch

from finetune.families.text import canonical
from finetune.interchange.adapter import Adapter, InterchangeError, Update
from finetune.interchange.commands import convert_adapter
from finetune.interchange.conversion import compare, write
from finetune.interchange.names import from_base
from finetune.interchange.reading import read_adapter
from tests.interchange.files import lora, noise
from tests.tiny import BUILDERS

FAMILIES = ("sd1", "sdxl", "sd3", "flux")
LAYERS = {
    "denoiser": r".*(to_q|to_k|to_v|to_out\.0|add_q_proj|ff\.net\.2|conv1|proj_mlp|norm_out\.linear|norm1\.linear)",
    "text": r".*(self_attn\.(q|k|v|out)_proj|mlp\.fc1)",
}


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """A small base of every family."""
    folder = tmp_path_factory.mktemp("twins")
    return {name: BUILDERS[name](folder / name) for name in FAMILIES}


def random_adapter(base, method: str = "lora", text: bool = True, scale: float = 0.5) -> Adapter:
    """Every kind of layer changed, each differently."""
    architecture = from_base(base)
    updates = {}
    for component, network in architecture.networks.items():
        kind = "denoiser" if component == architecture.denoiser else "text"
        if kind == "text" and (component != "text_encoder" or not text):
            continue
        for number, (module, shape) in enumerate(network.layers.items()):
            if len(shape) > 1 and re.fullmatch(LAYERS[kind], module):
                factors = lora(shape, 2 if number % 3 else 3, number)
                tensors = {"lora_A.weight": factors["A"], "lora_B.weight": factors["B"]}
                if method == "dora":
                    magnitude = 1 + noise(shape[0], key=number).abs()
                    tensors["lora_magnitude_vector"] = magnitude.reshape(1, -1, 1, 1) if len(shape) == 4 else magnitude
                updates[component, module] = Update(method, tensors, scale)
    return Adapter(updates, architecture, layout="made")


def fused(base, path) -> dict[tuple[str, str], torch.Tensor]:
    """What `load_lora_weights` makes of the weights, as differences to the base."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, local_files_only=True, safety_checker=None)
    before = weights_of(pipeline)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    pipeline.fuse_lora(components=[name for name in pipeline._lora_loadable_modules])  # noqa: C416
    pipeline.unload_lora_weights()
    after = weights_of(pipeline)
    return {place: after[place] - before[place] for place in before if not torch.equal(after[place], before[place])}


def weights_of(pipeline) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    for component in pipeline._lora_loadable_modules:
        for name, tensor in getattr(pipeline, component).state_dict().items():
            module = canonical(getattr(pipeline, component), component, name.removesuffix(".weight"))
            found[component, module] = tensor.clone()
    return found


def assert_equal_changes(adapter: Adapter, changes: dict) -> None:
    assert set(changes) == set(adapter.updates)
    for place, change in changes.items():
        wanted = adapter.updates[place].delta().reshape(change.shape)
        assert torch.allclose(change, wanted, atol=2e-6), place


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_applies_exactly_what_the_adapter_says(family, twins, tmp_path):
    """Its own loader is the judge of the layout that carries its name."""
    adapter = random_adapter(twins[family])
    write(adapter, tmp_path / "a.safetensors", to="diffusers", base=twins[family])
    assert_equal_changes(adapter, fused(twins[family], tmp_path / "a.safetensors"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_our_kohya_files(family, twins, tmp_path):
    """Ranks that differ from layer to layer are where its reader of kohya files goes wrong; ours are folded for it."""
    adapter = random_adapter(twins[family])
    write(adapter, tmp_path / "a.safetensors", to="kohya", base=twins[family])
    assert_equal_changes(adapter, fused(twins[family], tmp_path / "a.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "ours"])
def test_every_layout_comes_back(family, layout, twins, tmp_path):
    """What is written must be what is read, over every layout and kind of base, joined layers and all."""
    adapter = random_adapter(twins[family])
    adapter.metadata = {"modelspec.title": "Cat", "ss_output_name": "cat"}
    first = tmp_path / ("first" if layout == "peft" else "first.safetensors")
    write(adapter, first, to=layout, base=twins[family])
    convert_adapter(first, tmp_path / "back.safetensors", to="ours", base=twins[family])
    back = read_adapter(tmp_path / "back.safetensors", twins[family])
    worst, where, _ = compare(adapter, back)
    assert worst < 1e-6, where
    assert back.layout == "ours"
    assert adapter.metadata.items() <= back.metadata.items()


def test_joined_layers_keep_their_rank_when_they_come_back(twins, tmp_path):
    """Kohya's Flux layout joins q, k and v; a second trip through it must not let the rank grow."""
    adapter = random_adapter(twins["flux"], text=False)
    write(adapter, tmp_path / "a.safetensors", to="kohya", base=twins["flux"])
    once = read_adapter(tmp_path / "a.safetensors", twins["flux"])
    ranks = {place: update.rank for place, update in adapter.updates.items()}
    assert {place: update.rank for place, update in once.updates.items()} == ranks


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_dora_survives_where_the_layout_can_say_it(layout, twins, tmp_path):
    """DoRA's magnitudes are what other converters lose."""
    adapter = random_adapter(twins["sd1"], "dora")
    target = tmp_path / ("d" if layout == "peft" else "d.safetensors")
    write(adapter, target, to=layout, base=twins["sd1"])
    back = read_adapter(target, twins["sd1"])
    assert compare(adapter, back)[0] < 1e-6
    if layout == "diffusers":
        changes = fused(twins["sd1"], target)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(twins["sd1"], local_files_only=True)
        plain = weights_of(pipeline)
        for place, change in changes.items():
            assert torch.allclose(change, adapter.updates[place].delta(plain[place]), atol=1e-5), place


def test_dora_in_kohya_layout_is_refused_unless_asked_for(twins, tmp_path):
    """No two readers agree on it, so a user must choose it knowingly."""
    adapter = random_adapter(twins["sd1"], "dora")
    with pytest.raises(InterchangeError, match="programs read it differently") as refused:
        write(adapter, tmp_path / "d.safetensors", to="kohya", base=twins["sd1"])
    assert "--allow-lossy" in refused.value.text()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InterchangeError, match="depends on the base: give it with --base"):
        write(adapter, tmp_path / "d.safetensors", to="kohya", allow_lossy=True)
    done = write(adapter, tmp_path / "d.safetensors", to="kohya", base=twins["sd1"], allow_lossy=True)
    assert "LyCORIS" in done.notes[0]


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "ia3", "oft"])
def test_peft_loads_the_folder_and_does_the_same(method, twins, tmp_path):
    """PEFT's own layers are the judge: their merged weights must be ours."""
    base = twins["sd1"]
    network = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    adapter = peft_made(method, network, tmp_path / "made" / "unet")
    read = read_adapter(tmp_path / "made" / "unet", base)
    write(read, tmp_path / "again", to="peft", base=base)
    fresh = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "again" / "unet"))
    for name, tensor in loaded.merge_and_unload().state_dict().items():
        assert torch.allclose(tensor, adapter[name], atol=1e-6), name
        module = name.removesuffix(".weight")
        if ("unet", module) in read.updates:
            change = read.updates["unet", module].delta(plain[name])
            assert torch.allclose(plain[name] + change, tensor, atol=1e-5), name


def peft_made(method: str, network, folder) -> dict[str, torch.Tensor]:
    """Save an adapter of PEFT's own making; returns the merged weights."""
    targets = r".*attn1\.(to_q|to_k)"
    config = {
        "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=2, target_modules=targets),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=targets),
    }[method]()
    model = peft.get_peft_model(network, config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = noise(*parameter.shape, key=number) + (1.0 if "ia3" in name else 0.0)
    model.save_pretrained(str(folder))
    return model.merge_and_unload().state_dict()
