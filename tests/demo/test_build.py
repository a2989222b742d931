"""The builder from nothing on a budget of seconds: the same code path as the real build."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from finetune.demo.build.__main__ import Plan, build, main
from finetune.demo.build.autoencoder import new_autoencoder, normalise_latents, reconstruct, widened
from finetune.demo.build.denoiser import Mix, drawn_pictures, object_mask, objective_of_base
from finetune.demo.build.loop import Settings, train
from finetune.demo.build.measure import sample
from finetune.demo.checker import load_checker
from finetune.demo.scenes import COLOURS, Scene, draw_array


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A base built by the command in a few seconds; it draws noise, but every file is there."""
    out = tmp_path_factory.mktemp("base")
    arguments = ["--out", str(out), "--minutes", "0.1", "--pictures", "40", "--prompts", "4", "--seeds", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["build", *arguments])
        main()
    return out


def test_build_makes_a_pipeline_that_loads_and_draws(built):
    pipeline = StableDiffusionPipeline.from_pretrained(built / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    pictures = sample(pipeline, ["a red ball", "a sks robot"], steps=3)
    assert pictures.shape == (2, 3, 64, 64)
    assert torch.isfinite(pictures).all()


def test_build_writes_card_figures_and_sheet(built):
    figures = json.loads((built / "base" / "figures.json").read_text())
    card = (built / "base" / "README.md").read_text()
    assert f"{figures['autoencoder']['world']:.2f} dB" in card
    assert (built / "base" / "samples.png").stat().st_size < 300_000
    assert not list(built.glob("base.*"))


def test_rare_words_are_single_tokens(built):
    """A trigger in pieces shares its parts with other words, and teaching it would move them."""
    tokenizer = StableDiffusionPipeline.from_pretrained(built / "base", safety_checker=None).tokenizer
    for word in ("sks", "ohwx", "zwx", "mxv", "robot", "background"):
        assert len(tokenizer(word).input_ids) == 3
    assert tokenizer.model_max_length == 32


def test_built_checker_loads_and_names_everything(built):
    checker = load_checker(built / "checker.safetensors")
    verdicts = checker.judge(torch.zeros(3, 3, 64, 64))
    assert len(verdicts) == 3


def test_a_finished_build_runs_again_for_free(built):
    """Resuming must not train past the budget."""
    files = [built / "work" / stage / "progress.json" for stage in ("denoiser", "details")]
    before = [file.read_text() for file in files]
    build(Plan(built, built / "work", 0.1, 40, 4, 1), only=("autoencoder", "latents", "denoiser", "details", "checker"))
    assert [file.read_text() for file in files] == before


def test_normalised_latents_have_unit_variance_and_the_same_pictures():
    """The fold must be exact: scaling_factor 1 is only honest if latents are normal and pictures unchanged."""
    vae = new_autoencoder().eval()
    pictures = drawn_pictures(12, range(24), Mix(plain=0.5))
    before = reconstruct(vae, pictures)
    normalise_latents(vae, pictures)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
    assert np.abs(before.astype(int) - reconstruct(vae, pictures)).max() <= 2
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(8), atol=0.05)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(8), atol=0.05)


def test_a_widened_autoencoder_is_the_same_function():
    """The denoiser's latents were made by the narrow one, so the wide encoder must give exactly them."""
    vae = new_autoencoder().eval()
    pixels = torch.from_numpy(drawn_pictures(12, range(4), Mix(plain=0.5))).permute(0, 3, 1, 2).float() / 127.5 - 1
    wide = widened(vae).eval()
    with torch.no_grad():
        narrow_latents, wide_latents = (model.encode(pixels).latent_dist.mean for model in (vae, wide))
        assert torch.allclose(narrow_latents, wide_latents, atol=1e-4)
        assert torch.allclose(vae.decode(narrow_latents).sample, wide.decode(narrow_latents).sample, atol=1e-4)
    assert sum(p.numel() for p in wide.parameters()) > 3 * sum(p.numel() for p in vae.parameters())


def test_objects_and_ground_share_the_loss_equally():
    """Else a small object's shape would hardly count."""
    scenes = [Scene("ball", "red", "blue", size=size, position="left") for size in ("small", "medium", "large")]
    for scene, weights in zip(scenes, object_mask(scenes), strict=True):
        picture = torch.from_numpy(draw_array(scene)).float()
        drawn = (picture - torch.tensor(COLOURS["blue"])).abs().amax(2) > 8
        near = drawn.view(16, 4, 16, 4).any(3).any(1)
        (weight,) = weights[0][near].unique()
        inside = weights[0] == weight
        assert float(weights[0][inside].sum()) == pytest.approx(float(weights[0][~inside].sum()), rel=1e-4)


def test_schedule_ends_in_noise():
    """Layout and background are decided from the text only if the last level hides the picture."""
    alpha, sigma = objective_of_base().schedule.alpha_sigma(torch.arange(1000))
    assert float(alpha[-1]) ** 2 < 1e-4
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000))


def test_loop_resumes_where_it_stopped(tmp_path):
    """Twice a part of the budget must leave one optimizer history, not two."""
    module = torch.nn.Linear(3, 1)

    def loss_of(share, rng, generator):
        return (module(torch.ones(4, 3)) - 1).square().mean()

    train(module, Settings(tmp_path, minutes=0.005, batch=4, learning_rate=0.01), loss_of)
    first = json.loads((tmp_path / "progress.json").read_text())
    progress = train(module, Settings(tmp_path, minutes=0.01, batch=4, learning_rate=0.01), loss_of)
    assert progress.step > first["step"] > 0
    assert progress.seconds > first["seconds"]
