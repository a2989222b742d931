"""Single files in the original layout: what we write diffusers reads, and what diffusers reads we read alike."""

from __future__ import annotations

import json
import warnings

import diffusers
import pytest
import torch

from finetune.errors import CheckpointError, ConfigError
from finetune.families import FAMILIES, Choices, detect_family, load_family
from finetune.families.original_keys import config_of, to_original
from finetune.families.skeleton import shipped, tokenizer
from finetune.families.text import canonical
from finetune.interchange.original_names import STYLES
from finetune.storage import write_safetensors

WHOLE = sorted(set(FAMILIES) - {"flux"})
"""Families whose files hold every part under diffusers' own prefixes; Flux has a test of its own."""


def write_original(family, components, path, metadata=None, extra=None, parts=None):
    """The twin as a single file, by our own name tables."""
    named = components.modules()
    tensors = {}
    for component, layout in family.original.items():
        module = named["denoiser" if component == family.denoiser else component]
        if parts is None or component in parts:
            tensors |= to_original(layout, component, module, module.state_dict())
    write_safetensors(path, tensors | (extra or {}), metadata or {})
    return path


def read_back(path, folder, **choices):
    return load_family(str(path), choices=Choices(skeleton=folder, **choices))


def assert_same_networks(found, wanted):
    ours, theirs = found.modules(), wanted.modules()
    assert ours.keys() == theirs.keys()
    for part, module in theirs.items():
        state = ours[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(state[name], tensor), f"{part}.{name}"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_single_file_holds_the_same_model(name, twins, twin_folders, tmp_path):
    """Written in the original layout and read again, every weight of every network is the same to the bit."""
    family, components = twins[name]
    extra = {} if name != "sd2" else {"v_pred": torch.zeros(0)}
    path = write_original(family, components, tmp_path / "model.safetensors", extra=extra)
    again, found = read_back(path, twin_folders[name])
    assert again.name == name
    assert_same_networks(found, components)
    assert {key: type(value) for key, value in found.tokenizers.items()} == {
        key: type(value) for key, value in components.tokenizers.items()
    }
    assert not any(p.is_meta for module in found.modules().values() for p in module.parameters())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_diffusers_reads_our_single_file(name, twins, twin_folders, tmp_path):
    """The other programs' way in: `from_single_file` must find every weight where it looks for it."""
    family, components = twins[name]
    path = write_original(family, components, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = getattr(diffusers, family.pipeline_class).from_single_file(
            str(path), config=str(twin_folders[name]), local_files_only=True, torch_dtype=torch.float32
        )
    parts = {"denoiser": getattr(pipeline, family.denoiser), "vae": pipeline.vae}
    parts |= {encoder: getattr(pipeline, encoder) for encoder in family.text_encoders}
    for part, module in components.modules().items():
        own = module.state_dict()
        for key, tensor in parts[part].state_dict().items():
            assert torch.equal(tensor, own[key]), f"{part}.{key}"


def test_diffusers_reads_our_flux_transformer(twins, twin_folders, tmp_path, monkeypatch):
    """diffusers takes Flux's transformer from a file of its own, and knows only its real width."""
    from diffusers.loaders import single_file_utils

    family, components = twins["flux"]
    original = to_original(family.original["transformer"], "transformer", components.denoiser,
                           components.denoiser.state_dict())  # fmt: skip
    stripped = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in original.items()}
    source = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = __import__("inspect").getsource(source).replace("inner_dim = 3072", "inner_dim = 32")
    scope = dict(vars(single_file_utils))
    exec(compile(code, "converter", "exec"), scope)  # diffusers' own rules at the twin's width
    converted = scope[source.__name__](stripped)
    own = components.denoiser.state_dict()
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[key], own[key]) for key in own)


def test_a_flux_file_takes_its_other_parts_from_elsewhere(twins, twin_folders, tmp_path):
    """The files people own: transformer, autoencoder and text encoders, one file each."""
    family, components = twins["flux"]
    files = {
        part: write_original(family, components, tmp_path / f"{part}.safetensors", parts={part})
        for part in family.original
    }
    with pytest.raises(ConfigError, match=r"it holds no vae") as caught:
        read_back(files["transformer"], twin_folders["flux"])
    assert "model.text_encoders.text_encoder_2=FILE_OR_FOLDER" in str(caught.value)
    encoders = {name: str(files[name]) for name in family.text_encoders}
    _, found = read_back(files["transformer"], twin_folders["flux"], vae=str(files["vae"]), text_encoders=encoders)
    assert_same_networks(found, components)


def test_another_autoencoder_is_taken_and_counts_for_the_digest(twins, twin_folders):
    """The fp16-fix autoencoder is the commonest exchange; caches and adapters must notice it."""
    _, components = twins["sd1"]
    other = twin_folders["sdxl"] / "vae"
    _, found = load_family(str(twin_folders["sd1"]), choices=Choices(vae=str(other)))
    wanted = twins["sdxl"][1].vae.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.vae.state_dict().items())
    assert found.digests["vae"] != components.digests["vae"]
    assert found.digests["denoiser"] == components.digests["denoiser"]
    single = other / "diffusion_pytorch_model.safetensors"
    _, again = load_family(str(twin_folders["sd1"]), choices=Choices(vae=str(single)))
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in again.vae.state_dict().items())


@pytest.mark.parametrize(
    ("extra", "metadata", "prediction", "terminal"),
    [
        ({}, {}, "epsilon", None),
        ({"v_pred": torch.zeros(0)}, {}, "v_prediction", None),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, "v_prediction", True),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", None),
    ],
)
def test_a_file_says_itself_what_it_predicts(extra, metadata, prediction, terminal, twins, twin_folders, tmp_path):
    """Marks in the file decide, not its name; unmarked SDXL means epsilon to every program."""
    family, components = twins["sdxl"]
    path = write_original(family, components, tmp_path / "x.safetensors", metadata, extra)
    _, found = read_back(path, twin_folders["sdxl"])
    assert found.scheduler_config["prediction_type"] == prediction
    assert found.scheduler_config.get("rescale_betas_zero_snr", False) == bool(terminal)


def test_a_contradiction_about_the_prediction_is_refused(twins, twin_folders, tmp_path):
    """A wrong prediction type trains for hours towards noise."""
    family, components = twins["sdxl"]
    path = write_original(family, components, tmp_path / "x.safetensors", extra={"v_pred": torch.zeros(0)})
    with pytest.raises(ConfigError, match=r"model.prediction=epsilon contradicts the checkpoint.*v_pred"):
        read_back(path, twin_folders["sdxl"], prediction="epsilon")
    marks = {"modelspec.prediction_type": "epsilon"}
    both = write_original(family, components, tmp_path / "y.safetensors", marks, {"v_pred": torch.zeros(0)})
    with pytest.raises(ConfigError, match=r"contradicts itself"):
        read_back(both, twin_folders["sdxl"])
    with pytest.raises(ConfigError, match=r"scheduler_config.json"):
        load_family(str(twin_folders["sd1"]), choices=Choices(prediction="v_prediction"))


def test_sd2_must_be_explained_when_it_does_not_say(twins, twin_folders, tmp_path):
    """SD2 was published both ways and unmarked; guessing would ruin every second run."""
    family, components = twins["sd2"]
    path = write_original(family, components, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"set model.prediction=v_prediction or model.prediction=epsilon"):
        read_back(path, twin_folders["sd2"])
    _, found = read_back(path, twin_folders["sd2"], prediction="v_prediction")
    assert found.scheduler_config["prediction_type"] == "v_prediction"


def test_what_is_missing_or_left_over_is_named(twins, twin_folders, tmp_path):
    """A file that half fits would train a half-random model."""
    family, components = twins["sd1"]
    path = write_original(family, components, tmp_path / "x.safetensors", extra={"strange.weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"1 tensor belongs to nothing that is loaded, e.g. strange.weight"):
        read_back(path, twin_folders["sd1"])
    named = to_original(family.original["unet"], "unet", components.denoiser, components.denoiser.state_dict())
    lost = named.popitem()[0]
    text = components.text_encoders["text_encoder"]
    named |= to_original(family.original["text_encoder"], "text_encoder", text, text.state_dict())
    named |= to_original(family.original["vae"], "vae", components.vae, components.vae.state_dict())
    write_safetensors(tmp_path / "y.safetensors", named, {})
    with pytest.raises(ConfigError, match=rf"1 tensor is missing, e.g. {lost}"):
        read_back(tmp_path / "y.safetensors", twin_folders["sd1"])
    with pytest.raises(ConfigError, match=r"set model.skeleton"):
        load_family(str(write_original(family, components, tmp_path / "z.safetensors")))


def test_numbers_are_cast_on_the_way(twins, twin_folders, tmp_path):
    """fp16 in memory, and the autoencoder in fp32, because it overflows in fp16."""
    family, components = twins["sd1"]
    path = write_original(family, components, tmp_path / "x.safetensors")
    _, found = load_family(str(path), dtype=torch.float16, choices=Choices(skeleton=twin_folders["sd1"]))
    assert {p.dtype for p in found.denoiser.parameters()} == {torch.float16}
    assert {p.dtype for p in found.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", sorted({shape for family in FAMILIES.values() for shape in family.skeletons}))
def test_shipped_configurations_have_the_published_size(name):
    """A wrong width or depth would refuse every real file."""
    from finetune.families.skeleton import empty_network

    # The refiner's is not published to the last digit.
    published = {
        "sdxl-refiner": pytest.approx(2.26e9, rel=1e-3),
        "sd1": 859_520_964, "sd2-base": 865_910_724, "sd2-768": 865_910_724, "sdxl": 2_567_463_684,
        "sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520,
        "sd3.5-large": 8_056_627_520, "flux-dev": 11_901_408_320, "flux-schnell": 11_891_178_560,
    }  # fmt: skip
    networks = shipped(name).networks
    with torch.device("meta"):
        denoiser = empty_network(networks.get("unet") or networks["transformer"])
    assert sum(p.numel() for p in denoiser.parameters()) == published[name]


def test_the_shipped_tokenizer_is_clips_own():
    """Ids of a known sentence, as openai/clip-vit-large-patch14 gives them; SD2 and bigG pad with "!"."""
    ours = tokenizer({"kind": "clip", "pad_token": "<|endoftext|>"}, "text_encoder")
    assert len(ours) == 49408
    assert ours("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer({"kind": "clip", "pad_token": "!"}, "text_encoder_2")
    assert padded("a cat", padding="max_length").input_ids[4:] == [0] * 73
    with pytest.raises(ConfigError, match=r"set model.skeleton"):
        tokenizer({"kind": "t5"}, "text_encoder_3")


def test_a_damaged_base_is_refused_with_all_that_is_wrong(tmp_path):
    """Checkpoints come from strangers and slow downloads; tests/interchange/test_header.py has all damages."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"not a sound safetensors file.*fetch it again"):
        load_family(str(path))
    text = json.dumps({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"a": 1}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError) as refused:
        detect_family(path)
    assert len(refused.value.problems) == 2


STYLES_OF = {
    ("sd1", "unet"): "ldm", ("sd2", "unet"): "ldm", ("sdxl", "unet"): "ldm", ("sdxl_refiner", "unet"): "ldm",
    ("sd3", "transformer"): "mmdit", ("flux", "transformer"): "bfl", ("sd1", "text_encoder"): "same",
    ("sd2", "text_encoder"): "open_clip", ("sdxl", "text_encoder_2"): "open_clip",
}  # fmt: skip
"""Networks that both tables of original names know -> what `finetune.interchange` calls their layout."""


@pytest.mark.parametrize(("name", "component"), sorted(STYLES_OF))
def test_adapters_and_checkpoints_are_spelled_by_the_same_rules(name, component, twins):
    """Two tables name original layers, tensor by tensor for checkpoints and by rows for adapters; they must agree."""
    family, components = twins[name]
    module = components.denoiser if component == family.denoiser else components.text_encoders[component]
    layers = {
        canonical(module, component, key): tuple(layer.weight.shape)
        for key, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not key.endswith("text_projection")
    }
    settings, wanted = config_of(module), {}
    for layer, shape in layers.items():
        place = family.original[component].naming(f"{layer}.weight", settings)
        half = shape[0] // 2
        rows = [(half, shape[0]), (0, half)] if place.form == "swapped" else [(0, shape[0])]
        stem = place.name.removesuffix(".weight").removesuffix("_weight")
        wanted.setdefault(stem, {})[place.part] = [(layer, *span) for span in rows]
    own = {stem: [piece for part in sorted(parts) for piece in parts[part]] for stem, parts in wanted.items()}
    found = STYLES[STYLES_OF[name, component]](layers)
    assert {stem: list(pieces) for stem, pieces in found.items()} == own


@pytest.mark.parametrize("name", WHOLE)
def test_detection_gives_its_reasons(name, twins, tmp_path):
    """Nobody believes a verdict without a reason, and a wrong one must be arguable."""
    family, components = twins[name]
    found = detect_family(write_original(family, components, tmp_path / "x.safetensors"))
    assert found.family == name
    assert found.skeleton in family.skeletons
    assert found.reasons


@pytest.mark.parametrize(
    ("tensor", "shape", "says"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", (8, 8, 3, 3), "an instruct-pix2pix model"),
        ("lora_unet_x.lora_down.weight", (4, 4), "it is an adapter"),
        ("decoder.up.0.block.0.conv1.weight", (4, 4), "name it as model.vae"),
        ("down_blocks.0.resnets.0.conv1.weight", (4, 4), "one part of a diffusers folder"),
        ("distilled_guidance_layer.in_proj.bias", (4,), "Chroma"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", (4, 4), "model.text_encoders"),
    ],
)
def test_files_that_are_no_base_are_told_apart(tensor, shape, says, tmp_path):
    """The message must say what the file is and where it belongs."""
    write_safetensors(tmp_path / "x.safetensors", {tensor: torch.zeros(shape)}, {})
    with pytest.raises(ConfigError, match=says):
        detect_family(tmp_path / "x.safetensors")


def test_a_projection_that_files_cannot_hold_is_refused(twins):
    """SD3 files have no place for CLIP-L's projection; dropping one that matters would change every picture."""
    family, components = twins["sd3"]
    encoder = components.text_encoders["text_encoder"]
    state = encoder.state_dict() | {"text_projection.weight": torch.full((32, 32), 0.5)}
    with pytest.raises(ConfigError, match="not the identity"):
        to_original(family.original["text_encoder"], "text_encoder", encoder, state)
