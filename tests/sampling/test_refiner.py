"""`finetune sample --refiner`: a second base takes over within the schedule, as diffusers' two pipelines do it."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from finetune.errors import ConfigError
from finetune.families import load_family
from finetune.sampling.generate import build_pipeline, generate
from finetune.sampling.papers import shot_of
from finetune.sampling.stages import Refiner
from tests.conftest import command
from tests.tiny import write_twin

QUICK = {"seeds": [1], "steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twins of SDXL, its refiner and SD1."""
    root = tmp_path_factory.mktemp("bases")
    return {name: write_twin(name, root / name) for name in ("sdxl", "sdxl_refiner", "sd1")}


@torch.no_grad()
def test_it_is_diffusers_denoising_end_and_start(folders):
    """The same picture as from the two public pipelines, one handing its latents to the other."""
    family, parts = load_family(str(folders["sdxl"]))
    other, others = load_family(str(folders["sdxl_refiner"]))
    calls = []
    own = generate(
        family, parts, ["a cat"], refiner=Refiner(other, others, 0.6),
        progress=lambda done, total: calls.append((done, total)), **QUICK,
    )[0]  # fmt: skip
    base, refiner = build_pipeline(family, parts), build_pipeline(other, others)
    told = {"num_inference_steps": 5, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(1)}
    latents = base("a cat", height=64, width=64, denoising_end=0.6, output_type="latent", **told).images
    latents = refiner("a cat", image=latents, denoising_start=0.6, output_type="latent", **told).images
    pixels = family.decode_latents(parts.vae, latents)[0]
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert isinstance(refiner, diffusers.StableDiffusionXLImg2ImgPipeline)
    assert np.abs(np.asarray(own, dtype=int) - levels.astype(int)).max() <= 1
    assert own.tobytes() != generate(family, parts, ["a cat"], **QUICK)[0].tobytes()
    assert [done for done, _ in calls] == [1, 2, 3, 4, 5] and {total for _, total in calls} == {5}


def test_bases_that_share_no_schedule_are_refused(folders):
    """SD1 can neither hand over nor take over."""
    sdxl, sd1 = load_family(str(folders["sdxl"])), load_family(str(folders["sd1"]))
    with pytest.raises(ConfigError, match="cannot take over"):
        generate(*sdxl, ["a cat"], refiner=Refiner(*sd1), **QUICK)
    with pytest.raises(ConfigError, match="cannot hand over"):
        generate(*sd1, ["a cat"], refiner=Refiner(*sdxl), **QUICK)


def test_the_command_refines_and_makes_the_picture_again(folders, capsys, monkeypatch, tmp_path):
    """The picture knows its refiner and takes no other."""

    def sample(*arguments, expect=0):
        steps = () if "--from" in arguments else ("--steps", "5")
        options = ("--base", folders["sdxl"], *steps, "-o", tmp_path / "out")
        return command(capsys, monkeypatch, "sample", *arguments, *options, expect=expect)

    assert "last 20% of the schedule" in sample("a cat", "--refiner", folders["sdxl_refiner"])
    (made,) = (tmp_path / "out").glob("*.png")
    assert (shot_of(made).refiner, shot_of(made).refiner_start) == ("sdxl_refiner", 0.8)
    first = made.read_bytes()
    kept = made.rename(tmp_path / "kept.png")
    assert "not the one it was made with" in sample("--from", kept, "--refiner", folders["sdxl"], expect=2)
    sample("--from", kept, "--refiner", folders["sdxl_refiner"])
    assert made.read_bytes() == first
    assert "must start above 0 and below 1" in sample("a cat", "--refiner", f"{folders['sdxl_refiner']}@1", expect=2)
