"""Pictures come from the public pipeline, belong to prompt and seed, and leave the networks as they were."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import diffusers
import numpy as np
import peft
import pytest
import torch

from finetune.errors import CheckpointError, ConfigError, NumericError
from finetune.families import load_family
from finetune.families.frozen import host_bytes
from finetune.pictures import save_memory
from finetune.sampling.apply import adapter_applied
from finetune.sampling.generate import generate
from finetune.sampling.schedulers import FLOW, SCHEDULERS
from finetune.tracking import Reporter
from tests.tiny import random_adapter, write_twin

PROMPTS = ["a toy", "sks toy in the snow", "a cat"]
RANK, ALPHA = {"unet": 4, "text_encoder": 8}, {"unet": 2.0, "text_encoder": 24.0}


def apart(first, second) -> int:
    """The largest difference of two pictures in grey levels."""
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


def test_equals_plain_diffusers(base, base_folder):
    """A sample must be what the user will get from the same checkpoint, prompt and seed."""
    family, components = base
    ours = generate(family, components, ["sks toy"], seeds=[5], steps=3)[0]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base_folder)
    generator = torch.Generator().manual_seed(5)
    plain = pipeline("sks toy", num_inference_steps=3, negative_prompt="", generator=generator).images[0]
    assert apart(ours, plain) == 0


def test_picture_does_not_depend_on_its_batch(base):
    family, components = base
    together = generate(family, components, PROMPTS, seeds=[1, 2, 3], steps=3, batch_size=3)
    alone = [
        generate(family, components, [prompt], seeds=[seed], steps=3)[0]
        for prompt, seed in zip(PROMPTS, [1, 2, 3], strict=True)
    ]
    in_pairs = generate(family, components, PROMPTS, seeds=[1, 2, 3], steps=3, batch_size=2)
    assert max(apart(*pair) for pair in zip(together, alone, strict=True)) <= 2
    assert max(apart(*pair) for pair in zip(together, in_pairs, strict=True)) <= 2
    assert apart(together[0], together[1]) > 10


def test_adapter_changes_pictures_and_goes_again(base):
    """The weights must be bit-identical afterwards; sampling during training depends on it."""
    family, components = base
    before = {name: tensor.clone() for name, tensor in components.denoiser.state_dict().items()}
    plain = generate(family, components, ["sks toy"], seeds=[1], steps=2)[0]
    file = random_adapter(family, components, rank=RANK, alpha=ALPHA)
    changed = generate(family, components, ["sks toy"], seeds=[1], steps=2, adapters=[(file, 1.0)])[0]
    again = generate(family, components, ["sks toy"], seeds=[1], steps=2)[0]
    assert apart(plain, changed) > 10
    assert apart(plain, again) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in components.denoiser.state_dict().items())


def test_text_encoders_only_visit(base, monkeypatch):
    """T5 is larger than many denoisers: all prompts are read before the first step, and the encoder goes home."""
    family, components = base
    encoder, told = components.text_encoders["text_encoder"], []
    moved, forward = encoder.to, components.denoiser.forward
    monkeypatch.setattr(encoder, "to", lambda *where: told.append("moves") or moved(*where))
    monkeypatch.setattr(encoder, "forward", _noting(told, "reads", encoder.forward))
    monkeypatch.setattr(components.denoiser, "forward", _noting(told, "draws", forward))
    generate(family, components, PROMPTS, seeds=[1, 2, 3], steps=1, batch_size=2)
    assert told[0] == told[told.index("draws") - 1] == "moves"
    assert "moves" not in told[1 : told.index("draws") - 1] and "reads" not in told[told.index("draws") :]


def _noting(told, what, forward):
    def noted(*args, **kwargs):
        told.append(what)
        return forward(*args, **kwargs)

    return noted


def test_a_denoiser_that_does_not_fit_visits_layer_by_layer_and_draws_the_same(base):
    """--low-memory with an adapter on top; where everything fits, nothing is moved."""
    family, components = base
    file, noted = random_adapter(family, components, rank=RANK, alpha=ALPHA), []
    reporter = Reporter()
    reporter.note = noted.append
    drawn = []
    for free in (None, 2**33, 2**20):
        save_memory([components], [components.denoiser], free, reporter)
        drawn.append(generate(family, components, ["sks toy"], seeds=[1], steps=2, adapters=[(file, 1.0)])[0])
    assert apart(drawn[0], drawn[1]) == apart(drawn[0], drawn[2]) == 0
    assert len(noted) == 1 and "layer by layer" in noted[0]
    assert host_bytes(components.denoiser) > sum(p.nbytes for p in components.denoiser.parameters())


def test_leaves_modes_as_found(base):
    """A validation grid in the middle of training must not switch anything off."""
    family, components = base
    components.denoiser.train()
    components.denoiser.mid_block.eval()
    components.denoiser.enable_gradient_checkpointing()
    modes = [module.training for module in components.denoiser.modules()]
    generate(family, components, ["a toy"], seeds=[1], steps=1)
    assert [module.training for module in components.denoiser.modules()] == modes
    assert components.denoiser.is_gradient_checkpointing
    assert torch.is_grad_enabled()


def test_touches_no_global_randomness(base):
    state = torch.random.get_rng_state()
    generate(*base, ["a toy"], seeds=[1], steps=2, scheduler="euler_a")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", sorted(name for name in SCHEDULERS if not name.startswith(FLOW)))
def test_every_scheduler_draws(base, name):
    """The bar ends full, whatever the scheduler calls a step."""
    calls = []
    pictures = generate(
        *base, PROMPTS, seeds=[1, 2, 3], steps=2, scheduler=name, batch_size=2, height=32, width=64,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert [picture.size for picture in pictures] == [(64, 32)] * 3
    assert calls == sorted(calls) and calls[-1] == (4, 4) and {total for _, total in calls} == {4}


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_every_family_draws_with_every_scheduler_that_fits_and_refuses_the_others(name, tmp_path):
    """A sampler of another kind would draw grey; a traceback of diffusers helps nobody."""
    family, components = load_family(str(write_twin(name, tmp_path)))
    flow = {known for known in SCHEDULERS if known.startswith(FLOW)}
    fitting = {"sdxl": SCHEDULERS.keys() - flow, "sd3": flow, "flux": {"flow_euler"}}[name]
    for scheduler in SCHEDULERS:
        small = {"seeds": [1], "steps": 1, "width": 32, "height": 32}
        drawn = partial(generate, family, components, ["a"], scheduler=scheduler, **small)
        if scheduler in fitting:
            assert drawn()[0].size == (32, 32)
        else:
            with pytest.raises(ConfigError, match=f"scheduler={re.escape(scheduler)} does not fit"):
                drawn()


@pytest.mark.parametrize("text_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_denoiser_with_other_parts_in_fp32(base, text_dtype):
    """The usual training set-up: denoiser in bf16, autoencoder in fp32."""
    family, components = base
    expected = generate(family, components, ["a toy"], seeds=[1], steps=2)[0]
    components.denoiser.to(torch.bfloat16)
    components.text_encoders["text_encoder"].to(text_dtype)
    assert apart(generate(family, components, ["a toy"], seeds=[1], steps=2)[0], expected) < 40


def test_mistakes_are_told_together(base):
    with pytest.raises(ConfigError) as caught:
        generate(*base, PROMPTS, seeds=[1], steps=0, height=70)
    assert "3 prompts and 1 seeds" in caught.value.text()
    assert "steps=0" in caught.value.text()
    assert "height=70 is not a multiple of 8" in caught.value.text()
    with pytest.raises(ConfigError, match="did you mean euler"):
        generate(*base, ["a"], seeds=[1], scheduler="eular")


def test_picture_that_is_not_finite_is_refused(base):
    """A black square in a grid is easily overlooked."""
    family, components = base
    with torch.no_grad():
        components.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericError, match=r"prompt 0 \('a toy'\)"):
        generate(family, components, ["a toy"], seeds=[1], steps=1)


def test_networks_of_a_finished_training_draw_as_they_are_and_take_no_adapter_beside(base):
    """`generate(result.family, result.components, ...)` draws what was learned; the file on top would count twice."""
    family, components = base
    file = random_adapter(family, components, rank={"unet": 4}, alpha={"unet": 4.0}, preset="attention")
    applied = generate(family, components, ["sks toy"], seeds=[1], steps=2, adapters=[(file, 1.0)])[0]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    peft.inject_adapter_in_model(config, components.denoiser)
    for name, tensor in file.tensors.items():
        layer, _, factor = name.removeprefix("unet.").rpartition(".lora_")
        getattr(components.denoiser.get_submodule(layer), f"lora_{factor[0]}").default.weight.data = tensor
    assert apart(generate(family, components, ["sks toy"], seeds=[1], steps=2)[0], applied) <= 1
    with pytest.raises(CheckpointError, match="carry an adapter already"):
        generate(family, components, ["sks toy"], seeds=[1], steps=2, adapters=[(file, 1.0)])


def test_adapter_of_another_base_is_refused(base):
    family, components = base
    file = random_adapter(family, components, rank=RANK, alpha=ALPHA)
    file.tensors = {name.replace("down_blocks.0", "down_blocks.7"): t for name, t in file.tensors.items()}
    with pytest.raises(CheckpointError, match="no such layer"), adapter_applied(family, components, file):
        pass
    headless = dataclasses.replace(file.header, rank={"unet": 5, "text_encoder": 8})
    with pytest.raises(CheckpointError, match="do not fit the header's rank 5"):
        generate(family, components, ["a"], seeds=[1], adapters=[(dataclasses.replace(file, header=headless), 1.0)])
