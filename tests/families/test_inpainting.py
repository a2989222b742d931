"""Inpainting bases: what their UNet is shown in training is what the pipeline shows it, and the whole job runs."""

from __future__ import annotations

from random import Random

import pytest
import torch
from PIL import Image

from finetune import train
from finetune.data.cache import Filling
from finetune.data.dataset import Cut, load_pictures
from finetune.data.holes import HoleCache, drawn_hole, hole_of
from finetune.data.views import Augment, every_view, plain
from finetune.demo.subjects import write_subject_pictures
from finetune.demo.twin_job import twin_run
from finetune.export.run import export_run
from finetune.families import Choices, detect_family, load_family
from finetune.families.original_keys import to_original
from finetune.run_files import make_run
from finetune.sampling.generate import generate
from finetune.sampling.guides import Guides
from finetune.storage import read_safetensors, write_safetensors
from tests.tiny import write_twin

FAMILIES = ["sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)]
CUT = Cut(64, 8, upscale=True, background=(255, 255, 255), holes=True)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, the first with a mask that is white on its left half."""
    folder = tmp_path / "pictures"
    write_subject_pictures(folder, 3)
    first = min(folder.glob("*.png"))
    with Image.open(first) as image:
        mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    (folder / "masks").mkdir()
    mask.save(folder / "masks" / first.name)
    return load_pictures(folder, CUT)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_training_shows_the_unet_what_the_pipeline_shows_it(name, pictures, tmp_path, monkeypatch):
    """Mask and masked picture behind the noise, in this order, scale and sense; the reverse mask trains the reverse."""
    family, components = load_family(str(write_twin(name, tmp_path / "base", inpainting=True)))
    view = plain(pictures[0])
    holes = HoleCache(tmp_path / "cache", "vae", CUT.background)
    holes.prepare([view], lambda values: family.encode_images(components.vae, values), Filling(2))
    seen = []
    forward = components.denoiser.forward

    def spy(sample, *args, **kwargs):
        seen.append(sample.clone())
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(components.denoiser, "forward", spy)
    hole = Image.fromarray(hole_of(view)[0].numpy())
    with Image.open(pictures[0].path) as image:
        guides = Guides(image=image.convert("RGB"), mask=hole, strength=1.0)
    generate(family, components, ["a"], seeds=[0], steps=1, guidance_scale=1.0, height=64, width=64, guides=guides)
    wanted = holes.get(view)
    assert wanted.shape == (5, 8, 8)
    assert torch.equal(wanted[0], seen[0][0, 4])
    # The training resizes with torch, sampling with Pillow: a level or two of 255 in some pixels.
    assert torch.allclose(wanted[1:], seen[0][0, 5:], atol=0.02)
    assert 0.4 < wanted[0].mean() < 0.6


def test_own_masks_are_holes_and_every_fourth_version_is_hidden_whole(pictures):
    """The user's mask says what to repaint; the other pictures get holes of their own, each version another."""
    own, drawn, *_ = pictures
    views = every_view(own, Augment(holes=True, versions=4))
    shares = [float((hole_of(view) > 0).float().mean()) for view in views]
    assert shares[3] == 1.0
    assert all(abs(share - 0.5) < 0.05 for share in shares[:3])
    others = [hole_of(view) for view in every_view(drawn, Augment(holes=True, versions=8))]
    assert [bool(hole.all()) for hole in others].count(True) == 2
    assert len({hole.numpy().tobytes() for hole in others}) == 7
    assert torch.equal(others[0], hole_of(plain(drawn)))


def test_drawn_holes_are_large_but_leave_something():
    """Without a hole nothing is learnt of filling one; without a rest nothing of fitting in."""
    shares = [float((drawn_hole(64, 96, Random(i)) > 0).float().mean()) for i in range(300)]
    assert min(shares) > 0.02 and max(shares) < 0.98
    assert 0.25 < sum(shares) / len(shares) < 0.55


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_job_runs_on_an_inpainting_base(name, tmp_path):
    """Trains both networks, goes on to the bit, validates, draws its sheets and writes files that read back."""
    write_twin(name, tmp_path / "base", inpainting=True)
    document = twin_run(name, tmp_path).model_dump(mode="json")
    document["optimizer"] |= {"schedule": "constant"}
    document["validation"] |= {"every": 2, "quantiles": 2}
    document["samples"] |= {"inference_steps": 1}
    document["checkpoint"] |= {"every": 1}
    document["data"]["cache_folder"] = str(tmp_path / "cache")
    document["export"]["formats"] = ["single-file"]
    write_subject_pictures(tmp_path / "pictures", 4)

    def run(where, steps):
        return make_run(document | {"train": document["train"] | {"steps": steps}, "output_dir": str(tmp_path / where)})

    result = train(run("straight", 2))
    assert result.validation is not None and result.validation.value != 1.0
    train(run("halves", 1))
    train(run("halves", 2))
    whole, _ = read_safetensors(tmp_path / "straight" / "adapter.safetensors")
    halves, _ = read_safetensors(tmp_path / "halves" / "adapter.safetensors")
    assert whole.keys() == halves.keys() and all(torch.equal(whole[key], halves[key]) for key in whole)
    assert (tmp_path / "straight" / "samples" / "step-000002.png").is_file()
    assert len(export_run(tmp_path / "straight", run("straight", 2), tmp_path / "exports")) == 1


def test_a_single_file_is_known_by_its_channels(tmp_path):
    """Nobody should have to say that a checkpoint is an inpainting one."""
    folder = write_twin("sd1", tmp_path / "base", inpainting=True)
    family, components = load_family(str(folder))
    tensors = {}
    for component, layout in family.original.items():
        module = components.modules()["denoiser" if component == "unet" else component]
        tensors |= to_original(layout, component, module, module.state_dict())
    path = tmp_path / "inpainting.safetensors"
    write_safetensors(path, tensors, {})
    found = detect_family(path)
    assert (found.family, found.inputs) == ("sd1", 9)
    assert "an inpainting model" in found.reasons[-1]
    again, parts = load_family(str(path), choices=Choices(skeleton=folder))
    assert again.repaints(parts.denoiser.config)
