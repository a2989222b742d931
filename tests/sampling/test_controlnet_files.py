"""`--controlnet FILE`: single files in every layout that people have, told apart by their tensors alone."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file

from finetune.config import ModelConfig
from finetune.errors import ConfigError, UnsafeError
from finetune.families import load_family, network_configs
from finetune.families.controlnets import controlnet_problems, find_controlnet
from finetune.families.original_keys import CONTROLNET, XLABS, to_original
from finetune.families.skeleton import shipped
from finetune.sampling.generate import generate
from finetune.sampling.guides import Guides
from finetune.sampling.papers import shot_of
from tests.conftest import command
from tests.sampling.test_controlnet import QUICK, apart, controlnet_for, photo
from tests.tiny import write_twin


def written(path, network, layout=None):
    """A ControlNet as one file: in diffusers' own names, or in an original layout."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(to_original(layout, "controlnet", network, tensors) if layout else tensors, path)
    return path


def xlabs_for(parts):
    """A Flux ControlNet that looks at the picture itself, without single blocks, as XLabs' are; it expects latents of
    an eighth of the picture, as the real Flux has."""
    vae = dict(parts.vae.config) | {"block_out_channels": [8] * 4, "norm_num_groups": 4}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    torch.manual_seed(5)
    parts.vae = diffusers.AutoencoderKL.from_config(vae).eval()
    config = dict(parts.denoiser.config) | {"num_single_layers": 0, "patch_size": 2}
    config |= {"conditioning_embedding_channels": config["in_channels"] // 4}
    torch.manual_seed(4)
    made = diffusers.FluxControlNetModel.from_config(config)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.mark.parametrize("kind", ["sd1", "sd1 original", "sdxl", "sdxl original", "sd3", "flux", "flux XLabs"])
def test_a_file_is_the_network_it_was_written_from(kind, tmp_path):
    """To the bit, and its configuration, which no file holds, draws the same picture."""
    name = kind.split()[0]
    base = write_twin(name, tmp_path / "base")
    family, parts = load_family(str(base))
    network = xlabs_for(parts) if "XLabs" in kind else controlnet_for(name, parts)
    layout = CONTROLNET if "original" in kind else XLABS if "XLabs" in kind else None
    path = written(tmp_path / "control.safetensors", network, layout)
    configs = network_configs(ModelConfig(base=str(base))) | {"vae": parts.vae.config}
    found = find_controlnet(str(path), configs)
    assert found.problems(configs) == []
    read = found.load(torch.float32)
    assert type(read) is type(network)
    own = network.state_dict()
    assert read.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in read.state_dict().items())
    first, second = (
        generate(family, parts, ["a cat"], guides=Guides(control=photo(), controlnet=net), **QUICK)[0]
        for net in (network, read)
    )
    assert apart(first, second) == 0
    assert apart(first, generate(family, parts, ["a cat"], **QUICK)[0]) > 2


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_original_layout_is_the_one_diffusers_reads(name, tmp_path):
    """Our rules are our own; diffusers' converter has others, and must find the same tensors."""
    parts = load_family(str(write_twin(name, tmp_path / "base")))[1]
    network = controlnet_for(name, parts)
    file = load_file(written(tmp_path / "control.safetensors", network, CONTROLNET))
    assert all(key.startswith("control_model.") for key in file)
    own = network.state_dict()
    theirs = convert_controlnet_checkpoint(file, dict(network.config))
    # keep: diffusers' converter always gives the second embedding that only SDXL has other names for.
    assert {key: value for key, value in theirs.items() if value is not None}.keys() <= own.keys()
    same = [key for key in theirs if theirs[key] is not None]
    assert all(torch.equal(theirs[key], own[key]) for key in same)
    assert {key for key in own if key not in same} <= {key for key in own if key.startswith("add_embedding")}


def header_of(path, shapes):
    """A file of these shapes that takes no room: all tensors are holes."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with Path(path).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("skeleton", "layout"),
    [("sd1", None), ("sd1", CONTROLNET), ("sd2-base", CONTROLNET), ("sdxl", None), ("sdxl", CONTROLNET)],
)
def test_full_size_files_fit_the_shipped_shapes(skeleton, layout, tmp_path):
    """What people have is of full size; its shapes alone decide, and none of its gigabytes is read."""
    configs = shipped(skeleton).networks
    networks = {"denoiser": configs["unet"], "vae": configs["vae"]}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
        network = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    tensors = network.state_dict()
    tensors = to_original(layout, "controlnet", network, tensors) if layout else tensors
    path = header_of(tmp_path / "c_shuffle.safetensors", {name: tensor.shape for name, tensor in tensors.items()})
    found = find_controlnet(str(path), networks)
    assert found.problems(networks) == []
    assert found.config["global_pool_conditions"]
    other = shipped("sd1" if skeleton != "sd1" else "sdxl").networks
    other = {"denoiser": other["unet"], "vae": other["vae"]}
    (problem,) = find_controlnet(str(path), other).problems(other)
    assert "made for another kind of base: its cross_attention_dim is" in problem


def test_smaller_controlnets_of_sdxl_are_read(tmp_path):
    """diffusers publishes canny and depth ones with fewer or no text layers; their files say so by what they lack."""
    configs = shipped("sdxl").networks
    networks = {"denoiser": configs["unet"], "vae": configs["vae"]}
    small = {
        "small": {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
        "mid": {"transformer_layers_per_block": [0, 0, 1]},
    }
    for name, changed in small.items():
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
            config = dict(diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False).config) | changed
            network = diffusers.ControlNetModel.from_config(config)
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        found = find_controlnet(str(header_of(tmp_path / f"{name}.safetensors", shapes)), networks)
        assert found.problems(networks) == [], name


FOREIGN = {
    "kohya": ({"lllite_unet_input_blocks_1_1_to_q.down.0.weight": (8, 8)}, "ControlNet-LLLite"),
    "t2i": ({"adapter.body.0.resnets.0.block1.weight": (8, 8)}, "a T2I-Adapter"),
    "t2i light": ({"body.0.in_conv.weight": (8, 8, 1, 1)}, "a T2I-Adapter"),
    "control lora": ({"lora_controlnet": (1,), "zero_convs.0.0.weight": (8, 8)}, "a Control-LoRA"),
    "diff": ({"difference": (1,), "control_model.zero_convs.0.0.weight": (8, 8)}, "the difference to a base"),
    "union": ({"task_embedding": (6, 8), "controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)}, "a union"),
    "lora": ({"lora_unet_x.lora_down.weight": (4, 8)}, "it is an adapter"),
    "vae": ({"decoder.up_blocks.0.resnets.0.conv1.weight": (8, 8)}, "it is an autoencoder"),
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_what_is_no_controlnet_is_named(name, tmp_path):
    """Files that steer in another way, and files that do not steer at all."""
    shapes, told = FOREIGN[name]
    path = header_of(tmp_path / "file.safetensors", shapes)
    with pytest.raises(ConfigError, match=told):
        find_controlnet(str(path), None)


def test_a_pickled_controlnet_is_not_opened(tmp_path):
    """Most original ControlNets were published as .pth, which can run code."""
    path = tmp_path / "control_sd15_canny.pth"
    path.write_bytes(b"PK")
    with pytest.raises(UnsafeError, match="a pickle"):
        find_controlnet(str(path), None)


def test_the_command_draws_with_a_file_and_again(capsys, monkeypatch, tmp_path):
    """The papers know the weights; of the same network as a folder they are the same."""
    base, other = write_twin("sd1", tmp_path / "sd1"), write_twin("sdxl", tmp_path / "sdxl")
    network = controlnet_for("sd1", load_family(str(base))[1])
    file = written(tmp_path / "control_canny.safetensors", network, CONTROLNET)
    network.save_pretrained(tmp_path / "folder")
    photo().save(tmp_path / "photo.png")
    out = tmp_path / "out"

    def sample(*arguments, expect=0):
        control = ("--control", f"canny:{tmp_path / 'photo.png'}")
        control = ("--control", tmp_path / "photo.png") if "--from" in arguments else (*control, "--steps", 2)
        return command(capsys, monkeypatch, "sample", *arguments, *control, "-o", out, expect=expect)

    sample("a cat", "--base", base, "--controlnet", file)
    (made,) = out.glob("*.png")
    first, kept = made.read_bytes(), made.rename(tmp_path / "kept.png")
    assert "control" not in shot_of(kept).base
    for again in (file, tmp_path / "folder"):
        sample("--from", kept, "--base", base, "--controlnet", again)
        assert made.read_bytes() == first
        made.unlink()
    text = sample("a cat", "--base", other, "--controlnet", file, expect=2)
    assert "another kind of base: its cross_attention_dim is 32, the base's 80" in text and "Loading" not in text
    text = sample("a cat", "--base", base, "--controlnet", tmp_path / "no.safetensors", expect=2)
    assert "is no file here" in text


def embedded_controlnet(widths):
    parts = load_family("demo")[1]
    torch.manual_seed(3)
    made = diffusers.ControlNetModel.from_unet(parts.denoiser, conditioning_embedding_out_channels=widths)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_the_embedded_base_follows_one_that_halves_as_often_as_its_autoencoder(capsys, monkeypatch, tmp_path):
    """Its latents are a quarter of the picture; usual ControlNets make an eighth and are refused in words, before the
    base is loaded."""
    usual, own = embedded_controlnet((16, 32, 96, 256)), embedded_controlnet((16, 32, 96))
    usual.save_pretrained(tmp_path / "usual")
    file = written(tmp_path / "own.safetensors", own, CONTROLNET)
    photo().save(tmp_path / "photo.png")

    def sample(network, expect=0):
        options = ("--controlnet", network, "--control", tmp_path / "photo.png", "-o", tmp_path / "out", "--steps", 2)
        return command(capsys, monkeypatch, "sample", "a red ball", *options, expect=expect)

    text = sample(tmp_path / "usual", expect=2)
    assert "makes its picture 8 times smaller, the base's autoencoder 4 times" in text and "Loading" not in text
    sample(file)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    assert controlnet_problems({"_class_name": "ControlNetModel", "conditioning_channels": 6}, {}, None)
