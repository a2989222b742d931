"""Files of the published sizes, by their headers alone: sparse files that hold no weights and take no disk."""

from __future__ import annotations

import json

import pytest
import torch

from finetune.config import ModelConfig
from finetune.errors import ConfigError
from finetune.families import FAMILIES, denoiser_config, detect_family, load_family
from finetune.families.original_keys import to_original
from finetune.families.single_file import Filler
from finetune.families.skeleton import empty_network, shipped


class ReachedError(Exception):
    """All was judged, and the first weight would be read now."""


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    def stop(self):
        raise ReachedError

    monkeypatch.setattr(Filler, "fill", stop)


def published(path, name, shape, *, parts=None, extra=(), **changes):
    """A file with the names and shapes of a published model; `changes` are made to its denoiser's configuration."""
    family, networks = FAMILIES[name], shipped(shape).networks
    networks[family.denoiser] |= changes
    entries, at = {}, 0
    for part, layout in family.original.items():
        if parts is not None and part not in parts:
            continue
        network = empty_network(networks[part])
        state = network.state_dict()
        if "text_projection.weight" in state and name == "sd3" and part == "text_encoder":
            state["text_projection.weight"] = torch.eye(len(state["text_projection.weight"]))
        for key, tensor in to_original(layout, part, network, state).items():
            size = 2 * tensor.numel()
            entries[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
    entries |= {key: {"dtype": "F32", "shape": [0], "data_offsets": [at, at]} for key in extra}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize(("name", "shape", "changes", "extra", "told"), [
    ("sd1", "sd1", {"in_channels": 9}, (), (None, None, 9)),
    ("sdxl", "sdxl", {}, ("v_pred", "ztsnr"), ("v_prediction", True, None)),
    ("sdxl", "sdxl", {"in_channels": 9}, (), (None, None, 9)),
    ("sdxl_refiner", "sdxl-refiner", {}, (), (None, None, None)),
    pytest.param("sd3", "sd3-medium", {}, (), ("flow", None, None), marks=pytest.mark.slow),
    ("sd3", "sd3.5-medium", {}, (), ("flow", None, None)),
    pytest.param("sd3", "sd3.5-large", {}, (), ("flow", None, None), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_published_file_is_known_and_every_tensor_has_a_place(name, shape, changes, extra, told, tmp_path):
    """NoobAI's marks, inpainting inputs, 3.5's second attention and norms: all is settled before a weight is read."""
    parts = set(FAMILIES[name].original) - {"text_encoder_3"}
    path = published(tmp_path / "x.safetensors", name, shape, parts=parts, extra=extra, **changes)
    found = detect_family(path)
    assert (found.family, found.skeleton) == (name, shape)
    assert (found.prediction, found.zero_terminal_snr, found.inputs) == told
    wanted = shipped(shape).networks[FAMILIES[name].denoiser] | changes
    assert denoiser_config(ModelConfig(base=str(path))) == wanted
    with pytest.raises(ReachedError):
        load_family(str(path))


@pytest.mark.parametrize("shape", ["flux-dev", "flux-schnell"])
def test_a_flux_transformer_says_what_it_lacks(shape, tmp_path):
    """The published files hold nothing else; schnell is told no guidance."""
    path = published(tmp_path / "x.safetensors", "flux", shape, parts={"transformer"})
    assert detect_family(path).skeleton == shape
    with pytest.raises(ConfigError, match=r"it holds no vae; give one as model.vae") as refused:
        load_family(str(path))
    assert len(refused.value.problems) == 3


def test_a_pruned_model_is_refused_before_a_weight_is_read(tmp_path):
    """SSD-1B is an SDXL with fewer blocks; half of it would fit."""
    path = published(tmp_path / "x.safetensors", "sdxl", "sdxl", transformer_layers_per_block=[1, 2, 4])
    with pytest.raises(ConfigError, match=r"pruned or widened variant, set model.skeleton"):
        load_family(str(path))


@pytest.mark.parametrize(("extra", "says"), [
    (("edm_mean", "edm_std"), "Playground 2.5"), (("edm_vpred.sigma_max",), "CosXL"),
])  # fmt: skip
def test_models_noised_otherwise_are_refused(extra, says, tmp_path):
    """They look like SDXL and would train towards noise."""
    path = published(tmp_path / "x.safetensors", "sdxl", "sdxl", parts={"unet"}, extra=extra)
    with pytest.raises(ConfigError, match=says):
        load_family(str(path))
