"""What a base is called, what is said about it, and what is refused before anything is paid for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from finetune.cli.train import TWINS as OFFERED
from finetune.errors import ConfigError, UnsafeError
from finetune.families import FAMILIES, Choices, Reading, load_family
from finetune.families.notes import unet_notes
from finetune.families.twins import TWINS


def test_every_family_has_a_twin_and_a_demo():
    """Whoever adds a family gives it a twin, or nothing of it is ever run."""
    assert FAMILIES.keys() == TWINS.keys() == set(OFFERED)


def test_a_file_is_judged_without_torch():
    """Looking into a file must answer at once; torch alone takes seconds."""
    code = "import sys; from finetune.families import detect_family; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_presets_leave_out_what_nothing_reads(name, twins):
    """A layer that no output depends on gets no gradient, and the first step would stop the run."""
    family, components = twins[name]
    for component, module in components.modules().items():
        unread = None if component == "vae" else family.unread(component, module)
        if unread is None:
            continue
        layers = [layer for layer, _ in module.named_modules()]
        assert any(re.match(unread, layer) for layer in layers)
        pattern = family.targets("all", component, module)
        assert not [layer for layer in layers if re.fullmatch(pattern, layer) and re.match(unread, layer)]


@pytest.mark.parametrize(
    ("denoiser", "scheduler", "sign"),
    [
        ({"time_cond_proj_dim": 256}, {}, "time_cond_proj_dim"),
        ({}, {"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ({}, {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "Turbo"),
    ],
)
def test_distilled_bases_are_pointed_out(denoiser, scheduler, sign):
    """Training Turbo or LCM as if it were a base undoes what makes it fast, and people do it unknowingly."""
    assert sign in unet_notes(denoiser, scheduler)[0]


def test_ordinary_bases_raise_no_alarm(twins):
    """A warning that always comes is read by nobody."""
    assert [components.notes for _, components in twins.values()] == [()] * len(twins)
    zero = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert unet_notes({}, zero) == []


def test_choices_that_mean_nothing_are_refused_together(twin_folders):
    """An option that is silently without effect is believed to work."""
    wrong = Reading(clip_skip=2, prompt_chunks=3)
    with pytest.raises(ConfigError) as caught:
        load_family(str(twin_folders["flux"]), choices=Choices(reading=wrong))
    assert "model.clip_skip=2 means nothing for flux" in str(caught.value)
    assert "model.prompt_chunks=3 means nothing for flux" in str(caught.value)
    with pytest.raises(ConfigError, match="more than the 2 layers"):
        load_family(str(twin_folders["sd1"]), choices=Choices(reading=Reading(clip_skip=5)))
    with pytest.raises(ConfigError, match="cannot do without it"):
        load_family(str(twin_folders["sdxl"]), choices=Choices(text_encoders={"text_encoder": "none"}))
    with pytest.raises(ConfigError, match="names text_encoder_9; sdxl has text_encoder, text_encoder_2"):
        load_family(str(twin_folders["sdxl"]), choices=Choices(text_encoders={"text_encoder_9": "x"}))


def test_pickles_and_strangers_are_refused(tmp_path, twin_folders):
    """A pickle can run code; another file must be named for what it is."""
    (tmp_path / "x.ckpt").write_bytes(b"\x80")
    with pytest.raises(UnsafeError, match="run code"):
        load_family(str(tmp_path / "x.ckpt"))
    with pytest.raises(UnsafeError, match="run code"):
        load_family(str(twin_folders["sd1"]), choices=Choices(vae=str(tmp_path / "x.ckpt")))
    with pytest.raises(ConfigError, match="does not exist"):
        load_family(str(tmp_path / "gone.safetensors"))
    with pytest.raises(ConfigError, match="brings its own"):
        load_family(str(twin_folders["sd1"]), choices=Choices(skeleton=twin_folders["sd1"]))


def test_the_end_mark_is_the_tokenizers_own(twins):
    """With eos_token_id=2, as old configurations say, a learned word's id would be taken for the end of the text."""
    from finetune.families.loading import _true_end_mark

    _, components = twins["sdxl"]
    encoder, marks = components.text_encoders["text_encoder_2"], components.tokenizers["text_encoder_2"]
    own = encoder.text_model.eos_token_id
    encoder.text_model.eos_token_id = 2
    _true_end_mark(encoder, marks)
    assert encoder.text_model.eos_token_id == own == marks.eos_token_id


def test_v_prediction_folders_say_so(tmp_path):
    """SD1 fine-tuned to v-prediction is an SD1 folder whose scheduler says it."""
    from tests.tiny import tiny_pipeline

    _, components = load_family(str(tiny_pipeline(tmp_path / "v", "v_prediction")), dtype=torch.float32)
    assert components.scheduler_config["prediction_type"] == "v_prediction"
