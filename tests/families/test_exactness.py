"""What a family says must be what the public diffusers pipeline says, number for number."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch

from finetune.families import FAMILIES, Reading, SizeConditioning, load_family
from finetune.sampling.generate import build_pipeline
from tests.tiny import write_twin

PROMPTS = ["a cat", "sks toy on a hill"]
SIZES = SizeConditioning(
    original_size=torch.tensor([[70, 90], [64, 64]]),
    crop_top_left=torch.tensor([[3, 8], [0, 0]]),
    target_size=torch.tensor([[64, 64], [64, 64]]),
)


def pipeline_prompts(family, pipeline, **options):
    """What the pipeline's own `encode_prompt` gives for PROMPTS, under the family's names."""
    names = ["prompt", *(f"prompt_{i}" for i in (2, 3) if f"tokenizer_{i}" in pipeline.components)]
    if family.name.startswith("sdxl"):
        names = ["prompt", "prompt_2"]
    arguments = dict.fromkeys(names, PROMPTS) | {"device": "cpu", "num_images_per_prompt": 1} | options
    if family.name != "flux":
        arguments["do_classifier_free_guidance"] = False
    found = pipeline.encode_prompt(**arguments)
    pooled = {"flux": 1, "sd3": 2, "sdxl": 2, "sdxl_refiner": 2}.get(family.name)
    wanted = {"encoder_hidden_states": found[0]}
    if pooled is not None:
        wanted[list(family.pipeline_prompts)[1]] = found[pooled]
    return wanted


def encoded(family, components, prompts):
    return family.encode_prompts(components.text_encoders, family.tokenize(components.tokenizers, prompts))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_prompts_are_read_as_the_pipeline_reads_them(name, twins):
    """An adapter trained on other embeddings than those it is sampled with learns the difference."""
    family, components = twins[name]
    own = encoded(family, components, PROMPTS)
    wanted = pipeline_prompts(family, build_pipeline(family, components))
    assert own.keys() == wanted.keys() == family.pipeline_prompts.keys()
    for key, value in wanted.items():
        assert torch.equal(own[key], value), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_clip_skip_counts_layers_from_the_end(name, twins):
    """A1111's numbers are one more than the family's own layer counts in diffusers."""
    family, components = twins[name]
    skipped = replace(family, reading=replace(family.reading, clip_skip=family.clip_layer + 1))
    wanted = pipeline_prompts(family, build_pipeline(family, components), clip_skip=1)
    own = encoded(skipped, components, PROMPTS)
    assert torch.equal(own["encoder_hidden_states"], wanted["encoder_hidden_states"])
    assert not torch.equal(own["encoder_hidden_states"], encoded(family, components, PROMPTS)["encoder_hidden_states"])


@torch.no_grad()
def test_clip_skip_of_sd1_norms_the_earlier_layer(twins):
    """diffusers' own code for it fails with the installed transformers; A1111 applies the final norm as well."""
    family, components = twins["sd1"]
    skipped = replace(family, reading=replace(family.reading, clip_skip=2))
    encoder = components.text_encoders["text_encoder"]
    tokens = family.tokenize(components.tokenizers, PROMPTS)["text_encoder"]
    wanted = encoder.final_layer_norm(encoder(tokens, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(encoded(skipped, components, PROMPTS)["encoder_hidden_states"], wanted)
    assert not torch.equal(encoded(family, components, PROMPTS)["encoder_hidden_states"], wanted)


class Caught(Exception):
    """Stops a pipeline at its first call of the denoiser."""


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_predictions_equal_the_pipelines_first_step(name, twins, monkeypatch):
    """Timestep unit, sizes, packing, positions and pooled text: all must be what the denoiser is used with."""
    family, components = twins[name]
    family = replace(family, reading=replace(family.reading, guidance=3.5))
    pipeline = build_pipeline(family, components)
    seen = {}
    forward = components.denoiser.forward

    def spy(*args, **kwargs):
        seen["latents"] = (kwargs.get("hidden_states") if kwargs.get("hidden_states") is not None else args[0]).clone()
        seen["timestep"] = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen["answer"] = forward(*args, **kwargs)
        raise Caught

    monkeypatch.setattr(components.denoiser, "forward", spy)
    canvas = (
        {"image": torch.zeros(2, 4, 8, 8), "strength": 1.0}
        if family.pipeline_starts_from_picture
        else {"height": 64, "width": 64}
    )
    generator = torch.Generator().manual_seed(0)
    # SDXL's refiner is asked without guidance: then the pipeline tells it the aesthetic score of a good picture.
    strength = {"guidance_scale": 3.5 if name == "flux" else 1.0}
    with pytest.raises(Caught):
        pipeline(prompt=PROMPTS, generator=generator, output_type="latent", num_inference_steps=2, **canvas, **strength)
    monkeypatch.undo()
    square = torch.tensor([[64, 64]] * 2)
    timestep = torch.as_tensor(seen["timestep"]).reshape(-1).expand(2)
    answer = seen["answer"][0] if isinstance(seen["answer"], tuple) else seen["answer"].sample
    own = family.predict(
        components.denoiser,
        family.as_picture(seen["latents"], 8, 8),
        timestep * (1000 if name == "flux" else 1),
        encoded(family, components, PROMPTS),
        SizeConditioning(square, torch.zeros_like(square), square),
    )
    assert torch.equal(own, family.as_picture(answer, 8, 8))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_latents_come_back_as_the_pipeline_decodes_them(name, twins):
    """Scale and shift belong to the autoencoder's own configuration; a wrong one trains on another world."""
    family, components = twins[name]
    config = components.vae.config
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = family.encode_images(components.vae, pixels)
    posterior = components.vae.encode(pixels).latent_dist
    shift = config.shift_factor or 0.0
    assert torch.equal(latents.mean, (posterior.mean - shift) * config.scaling_factor)
    assert torch.equal(latents.std, posterior.std * config.scaling_factor)
    wanted = components.vae.decode(latents.mean / config.scaling_factor + shift).sample
    assert torch.equal(family.decode_latents(components.vae, latents.mean), wanted)


@torch.no_grad()
def test_channel_statistics_of_an_autoencoder_are_used(twins, monkeypatch):
    """Some SDXL autoencoders normalise per channel; diffusers' pipeline undoes it, so training must do it."""
    family, components = twins["sdxl"]
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    plain = family.encode_images(components.vae, pixels)
    config = dict(components.vae.config) | {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    monkeypatch.setattr(components.vae, "_internal_dict", diffusers.configuration_utils.FrozenDict(config))
    normed = family.encode_images(components.vae, pixels)
    scale = config["scaling_factor"]
    mean, std = (torch.tensor(config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    assert torch.allclose(normed.mean, (plain.mean / scale - mean) * scale / std, atol=1e-6)
    assert torch.allclose(normed.std, plain.std / std, atol=1e-6)
    back = family.decode_latents(components.vae, normed.mean)
    assert torch.allclose(back, components.vae.decode(plain.mean / scale).sample, atol=1e-4)


def test_sdxl_is_told_the_cut(twins):
    """Original size, then top and left of the crop, then target size: (height, width) each."""
    family, _ = twins["sdxl"]
    assert family.time_ids(SIZES).tolist() == [[70, 90, 3, 8, 64, 64], [64, 64, 0, 0, 64, 64]]
    refiner, _ = twins["sdxl_refiner"]
    assert refiner.time_ids(SIZES).tolist() == [[70, 90, 3, 8, 6], [64, 64, 0, 0, 6]]


@torch.no_grad()
def test_an_empty_prompt_is_what_guidance_subtracts(twins):
    """Where the checkpoint zeroes the empty prompt when sampling, caption dropout must train on zeros as well."""
    family, components = twins["sdxl"]
    found = encoded(family, components, ["", "a cat"])
    pipeline = build_pipeline(family, components)
    _, negative, _, pooled = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(found["encoder_hidden_states"][:1], negative)
    assert torch.equal(found["text_embeds"][:1], pooled)
    assert found["encoder_hidden_states"][1].abs().sum() > 0
    plain, parts = twins["sd1"]
    assert encoded(plain, parts, [""])["encoder_hidden_states"].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_long_prompts_are_read_chunk_by_chunk(name, twins):
    """75 tokens at a time, each chunk as if it stood alone; a short prompt's first chunk is the usual reading."""
    family, components = twins[name]
    long = replace(family, reading=replace(family.reading, prompt_chunks=3))
    tokens = long.tokenize(components.tokenizers, ["a cat", "z" * 200])
    first = tokens["text_encoder_2" if name == "sdxl" else "text_encoder"]
    assert first.shape == (2, 231)
    marks = components.tokenizers["text_encoder"]
    assert first[1, ::77].tolist() == [marks.bos_token_id] * 3
    assert first[1, 76::77].tolist() == [marks.eos_token_id, marks.eos_token_id, marks.pad_token_id]
    letters = [int(i) for i in first[1] if int(i) not in (marks.bos_token_id, marks.eos_token_id)]
    assert letters == marks("z" * 200, add_special_tokens=False).input_ids
    chunked, plain = encoded(long, components, ["a cat"]), encoded(family, components, ["a cat"])
    for key, value in plain.items():
        same = chunked[key][:, :77] if value.ndim == 3 else chunked[key]
        assert torch.allclose(same, value[:, :77] if value.ndim == 3 else value, atol=1e-6), key


@torch.no_grad()
def test_sd3_without_t5_reads_zeros_in_its_place(tmp_path):
    """T5 is nine gigabytes; leaving it out must mean what diffusers means by it."""
    from finetune.families import Choices

    folder = write_twin("sd3", tmp_path / "sd3")
    family, components = load_family(str(folder), choices=Choices(text_encoders={"text_encoder_3": "none"}))
    assert list(components.text_encoders) == ["text_encoder", "text_encoder_2"]
    wanted = pipeline_prompts(family, build_pipeline(family, components))
    own = encoded(family, components, PROMPTS)
    assert all(torch.equal(own[key], value) for key, value in wanted.items())


@torch.no_grad()
def test_guidance_strength_reaches_a_distilled_denoiser(twins):
    """Flux dev is told how strong guidance should look; the run's value must arrive."""
    family, components = twins["flux"]
    latents = torch.zeros(1, 16, 8, 8)
    told = encoded(family, components, ["a cat"])
    square = torch.tensor([[64, 64]])
    answers = [
        replace(family, reading=replace(family.reading, guidance=strength)).predict(
            components.denoiser, latents, torch.tensor([500.0]), told, SizeConditioning(square, square, square)
        )
        for strength in (1.0, 4.0)
    ]
    assert not torch.equal(*answers)


def test_reading_has_no_other_defaults():
    """A family in the table has nothing chosen."""
    assert all(family.reading == Reading() for family in FAMILIES.values())


def test_checkpoints_are_named_as_modelspec_names_them():
    """Programs choose by this id how to load a file; the 768 px SD2 and schnell have ids of their own."""
    named = {
        (name, family.modelspec({"guidance_embeds": told}, {"prediction_type": predicted}))
        for name, family in FAMILIES.items()
        for told, predicted in ((True, "epsilon"), (False, "v_prediction"))
    }
    assert {
        ("sd1", "stable-diffusion-v1"), ("sd2", "stable-diffusion-v2-512"), ("sd2", "stable-diffusion-v2-768-v"),
        ("sdxl", "stable-diffusion-xl-v1-base"), ("flux", "flux-1-dev"), ("flux", "flux-1-schnell"),
    } <= named  # fmt: skip
