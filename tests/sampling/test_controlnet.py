"""`finetune sample --controlnet`: as diffusers' own pipelines do it, with edges as OpenCV draws them."""

from __future__ import annotations

import hashlib

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.errors import ConfigError
from finetune.families import load_family
from finetune.sampling.edges import canny
from finetune.sampling.generate import build_pipeline, generate
from finetune.sampling.guides import Guides
from finetune.sampling.papers import shot_of
from tests.conftest import command
from tests.tiny import write_twin

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
    """Where diffusers has the pipeline it is used, also on a picture that is changed."""
    family, parts = load_family(str(write_twin(name, tmp_path / "base")))
    network = controlnet_for(name, parts)
    guides = Guides(control=photo(), controlnet=network)
    assert apart(
        generate(family, parts, ["a cat"], guides=guides, **QUICK)[0], generate(family, parts, ["a cat"], **QUICK)[0]
    ) > 2
    both = Guides(image=photo(), strength=0.6, control=photo(), controlnet=network)
    if name == "sd3":
        with pytest.raises(ConfigError, match="diffusers has no pipeline"):
            generate(family, parts, ["a cat"], guides=both, **QUICK)
    else:
        changed = generate(family, parts, ["a cat"], guides=Guides(image=photo(), strength=0.6), **QUICK)[0]
        assert apart(generate(family, parts, ["a cat"], guides=both, **QUICK)[0], changed) > 2


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
    assert "another kind of base" in sample("a cat", "--controlnet", tmp_path / "foreign", *control, expect=2)
    told = sample("a cat", *network, "--control", f"cany:{tmp_path / 'photo.png'}", "--mask", made, expect=2)
    for words in ("did you mean canny", "cannot be combined", "a picture to repaint is needed"):
        assert words in told
    assert "cannot be loaded" in sample("a cat", "--controlnet", tmp_path / "nowhere", *control, expect=2)
    text = sample("a cat", "--controlnet", "nowhere", *control, expect=2)
    assert "neither a folder here nor a hub id" in text and "Loading" not in text
