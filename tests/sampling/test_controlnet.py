"""`finetune sample --controlnet`: as diffusers' own pipelines do it, with edges as OpenCV draws them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from finetune.errors import ConfigError
from finetune.families import load_family
from finetune.sampling.depth import depth_map
from finetune.sampling.edges import canny
from finetune.sampling.generate import build_pipeline, generate
from finetune.sampling.guides import Guides
from finetune.sampling.papers import shot_of
from tests.conftest import command
from tests.tiny import write_twin
from tests.tiny.depth import depth_anything, dpt, write_depth_model

QUICK = {"seeds": [1], "steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}


def photo():
    """Waves in three colours and a darker rectangle."""
    y, x = np.mgrid[0:96, 0:128]
    waves = [127 + 127 * np.sin(x / (5 + c) + c) * np.cos(y / (7 + c)) for c in range(3)]
    levels = np.stack(waves, -1).round().astype(np.uint8)
    levels[20:60, 30:90] //= 2
    return Image.fromarray(levels)


def controlnet_for(name, components):
    """A tiny random ControlNet of the real class; all of it answers, as after training."""
    denoiser = components.denoiser
    torch.manual_seed(3)
    if name == "sd3":
        made = diffusers.SD3ControlNetModel.from_transformer(denoiser, num_layers=1, num_extra_conditioning_channels=0)
    elif name == "flux":
        made = diffusers.FluxControlNetModel.from_config(dict(denoiser.config))
    else:
        made = diffusers.ControlNetModel.from_unet(denoiser)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def apart(first, second):
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def test_edges_are_those_of_opencv():
    """ControlNets were trained on its edges; the digest is that of cv2.Canny(photo, 100, 200) of OpenCV 5.0."""
    edges = np.asarray(canny(photo()))[..., 0] > 0
    assert edges.sum() == 555
    assert hashlib.sha256(edges.tobytes()).hexdigest()[:16] == "c72971a0b202aaa1"


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_it_is_diffusers_controlnet_pipeline(name, tmp_path):
    """The same picture as from the public pipeline that is told the same."""
    family, parts = load_family(str(write_twin(name, tmp_path / "base")))
    network = controlnet_for(name, parts)
    edges = canny(photo().resize((64, 64), Image.Resampling.LANCZOS))
    guides = Guides(control=photo(), control_from="canny", controlnet=network, control_scale=0.8)
    own = generate(family, parts, ["a cat"], guides=guides, **QUICK)[0]
    public = diffusers.AutoPipelineForText2Image.from_pipe(build_pipeline(family, parts), controlnet=network)
    told = {"controlnet_conditioning_scale": 0.8, "num_inference_steps": 2, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(1)
    wanted = public("a cat", image=edges, generator=generator, **told).images[0]
    assert apart(own, wanted) <= 1
    assert apart(own, generate(family, parts, ["a cat"], **QUICK)[0]) > 10


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_every_family_follows_a_control_picture(name, tmp_path):
    """On nothing, on a picture that is changed and under a mask, the same twice."""
    family, parts = load_family(str(write_twin(name, tmp_path / "base")))
    network = controlnet_for(name, parts)
    steered = {"control": photo(), "controlnet": network}
    mask = Image.linear_gradient("L")
    ways = [{}, {"image": photo(), "strength": 0.6}, {"image": photo(), "mask": mask, "strength": 1.0}]
    for way in ways:
        first, again = (generate(family, parts, ["a cat"], guides=Guides(**way, **steered), **QUICK)[0] for _ in "12")
        assert apart(first, again) == 0
        assert apart(first, generate(family, parts, ["a cat"], guides=Guides(**way), **QUICK)[0]) > 2


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.35, 0.6])
def test_a_picture_under_a_controlnet_begins_where_diffusers_begins(strength, tmp_path):
    """diffusers has no such pipeline for SD3; under a ControlNet of no strength it must be the one without."""
    family, parts = load_family(str(write_twin("sd3", tmp_path / "base")))
    told = {"image": photo(), "strength": strength}
    steered = Guides(**told, control=photo(), controlnet=controlnet_for("sd3", parts), control_scale=0.0)
    quick = QUICK | {"steps": 7}
    first, second = (generate(family, parts, ["a cat"], guides=way, **quick)[0] for way in (Guides(**told), steered))
    assert apart(first, second) <= 1
    mask = Image.linear_gradient("L")
    masked = (replace(way, mask=mask) for way in (Guides(**told), steered))
    first, second = (generate(family, parts, ["a cat"], guides=way, **quick)[0] for way in masked)
    assert apart(first, second) <= 1
    with pytest.raises(ConfigError, match="cannot begin within its schedule"):
        generate(family, parts, ["a cat"], guides=steered, scheduler="flow_heun", **quick)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_inpainting_base_follows_a_control_picture(name, tmp_path):
    """Its denoiser is shown the mask and the ControlNet is not."""
    family, parts = load_family(str(write_twin(name, tmp_path / "base", inpainting=True)))
    plain = load_family(str(write_twin(name, tmp_path / "plain")))[1]
    mask = Image.linear_gradient("L")
    both = Guides(image=photo(), mask=mask, strength=0.8, control=photo(), controlnet=controlnet_for(name, plain))
    masked = Guides(image=photo(), mask=mask, strength=0.8)
    drawn = generate(family, parts, ["a cat"], guides=both, **QUICK)[0]
    assert apart(drawn, generate(family, parts, ["a cat"], guides=masked, **QUICK)[0]) > 2


def test_the_command_follows_edges_and_makes_the_picture_again(capsys, monkeypatch, tmp_path):
    """From a photo and a folder to a PNG that knows both, and back; wrong ones are told apart."""
    base, other = write_twin("sd1", tmp_path / "sd1"), write_twin("sdxl", tmp_path / "sdxl")
    controlnet_for("sd1", load_family(str(base))[1]).save_pretrained(tmp_path / "control")
    controlnet_for("sdxl", load_family(str(other))[1]).save_pretrained(tmp_path / "foreign")
    photo().save(tmp_path / "photo.png")

    def sample(*arguments, expect=0):
        steps = () if "--from" in arguments else ("--steps", "2")
        options = ("--base", base, *steps, "-o", tmp_path / "out")
        return command(capsys, monkeypatch, "sample", *arguments, *options, expect=expect)

    network, control = ("--controlnet", tmp_path / "control"), ("--control", f"canny:{tmp_path / 'photo.png'}")
    sample("a cat", *network, *control)
    (made,) = (tmp_path / "out").glob("*.png")
    assert shot_of(made).control_from == "canny"
    first = made.read_bytes()
    kept = made.rename(tmp_path / "kept.png")
    assert "--controlnet" in sample("--from", kept, "--control", tmp_path / "photo.png", expect=2)
    sample("--from", kept, *network, "--control", tmp_path / "photo.png")
    assert made.read_bytes() == first
    text = sample("a cat", "--controlnet", tmp_path / "foreign", *control, expect=2)
    assert "another kind of base: its cross_attention_dim is 80, the base's 32" in text and "Loading" not in text
    text = sample("a cat", "--controlnet", base / "vae", *control, expect=2)
    assert "it is of class AutoencoderKL; a ControlNet" in text
    wrong = ("--control", f"cany:{tmp_path / 'photo.png'}", "--mask", made, "--depth-model", tmp_path)
    told = sample("a cat", *network, *wrong, expect=2)
    for words in ("did you mean canny", "a picture to repaint is needed", "no picture to estimate"):
        assert words in told
    assert "cannot be loaded" in sample("a cat", "--controlnet", tmp_path / "nowhere", *control, expect=2)
    text = sample("a cat", "--controlnet", "nowhere", *control, expect=2)
    assert "neither a file or folder here nor a hub id" in text and "Loading" not in text


def test_depth_is_that_of_transformers(tmp_path):
    """As its own pipeline draws it; where a model answers in metres, near is white all the same."""
    for number, model in enumerate((dpt(), depth_anything())):
        folder = write_depth_model(tmp_path / str(number), model)
        map_, _ = depth_map(photo(), str(folder))
        wanted = transformers.pipeline("depth-estimation", model=str(folder))(photo())["depth"]
        assert apart(map_, wanted.convert("RGB")) == 0
    metres = write_depth_model(tmp_path / "metres", depth_anything(depth_estimation_type="metric", max_depth=20))
    far = transformers.pipeline("depth-estimation", model=str(metres))(photo())["depth"]
    near = np.asarray(depth_map(photo(), str(metres))[0], dtype=int)[..., 0]
    assert np.corrcoef(near.ravel(), np.asarray(far, dtype=int).ravel())[0, 1] < -0.8


def test_the_command_follows_depth_under_a_mask_and_makes_the_picture_again(capsys, monkeypatch, tmp_path):
    """The depth model belongs to the picture as its base does: another one is refused, as is one that is none."""
    base = write_twin("sd1", tmp_path / "sd1")
    controlnet_for("sd1", load_family(str(base))[1]).save_pretrained(tmp_path / "control")
    write_depth_model(tmp_path / "dpt", dpt())
    write_depth_model(tmp_path / "other", depth_anything())
    photo().save(tmp_path / "photo.png")
    Image.linear_gradient("L").save(tmp_path / "mask.png")

    def sample(*arguments, model="dpt", expect=0):
        options = ("--base", base, "--controlnet", tmp_path / "control", "--image", tmp_path / "photo.png")
        options += ("--mask", tmp_path / "mask.png", "--depth-model", tmp_path / model, "-o", tmp_path / "out")
        return command(capsys, monkeypatch, "sample", *arguments, *options, expect=expect)

    told = ("a cat", "--steps", 3, "--strength", 0.7, "--control", f"depth:{tmp_path / 'photo.png'}")
    sample(*told)
    (made,) = (tmp_path / "out").glob("*.png")
    first, kept = made.read_bytes(), made.rename(tmp_path / "kept.png")
    again = ("--from", kept, "--control", tmp_path / "photo.png")
    assert "depth-model is not the one it was made with" in sample(*again, model="other", expect=2)
    sample(*again)
    assert made.read_bytes() == first
    text = sample(*told, model="control", expect=2)
    assert "--depth-model" in text and "cannot be loaded" in text and "Loading the base" not in text
