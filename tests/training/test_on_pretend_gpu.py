"""The whole trainer on a GPU that is not there (`tests.pretend_gpu`): its CUDA branches, and what waits for the device.

Tensors on it compute on the CPU, so everything runs and gives numbers; what CUDA refuses, it refuses.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes  # noqa: F401 - before a GPU is pretended, for which it would look for another library
import pytest
import torch
from torch import nn

from finetune.config import Run
from finetune.demo.twin_job import twin_run
from finetune.errors import ConfigError, NumericError, ResourceError
from finetune.families import load_family
from finetune.families.frozen import held_in_int8
from finetune.families.twins import write_twin
from finetune.run_files import make_run
from finetune.tracking import Reporter, Rows
from finetune.training import build, loop
from finetune.training.meter import Meter, Policy
from finetune.training.model import TrainableModel
from finetune.training.planning import plan_run
from finetune.training.step import StepResult
from finetune.training.trainer import _memory_errors, train
from tests.pretend_gpu import Gpu, pretend_gpu

PROMPTS = {"prompts": ["a sks robot"], "per_prompt": 1, "inference_steps": 2}
JOBS = {
    "sd1": {"samples": PROMPTS, "train": {"ema_decay": 0.9}},
    "sd2": {"objective": {"teacher": {"prompts": ["a robot"]}}, "optimizer": {"name": "adamw"}},
    "sdxl": {
        "data": {"caption_template": "a <robot>", "captions": "template", "trigger": None},
        "tokens": {"words": {"<robot>": "toy"}},
    },
    "sdxl_refiner": {"train": {"gradient_accumulation_steps": 2}, "model": {"storage": "int8"}},
    "sd3": {"model": {"storage": "nf4"}, "train": {"gradient_checkpointing": False}, "samples": PROMPTS},
    "flux": {"model": {"storage": "host"}, "objective": {"loss": "huber", "huber_schedule": "snr"}},
}
"""Family -> what its run has besides LoRA on the denoiser and the CLIPs; together they have nearly everything."""


def job(name: str, folder: Path, pictures: Path, changes: dict) -> Run:
    """Two steps on the tiny model of a family, validation included."""
    write_twin(name, folder / "base")
    document = twin_run(name, folder).model_dump(mode="json")
    document["data"]["folder"] = str(pictures)
    document["train"] |= {"steps": 2, "batch_size": 2}
    document["validation"] |= {"every": 2, "holdout": 1, "quantiles": 2}
    document["samples"] = {}
    for section, values in changes.items():
        document[section] = {**(document[section] or {}), **values}
    return make_run(document)


def waits_within(gpu: Gpu, monkeypatch, owner: object, name: str) -> list[list[str]]:
    """Fills with what waits for the device in each call of a function of ours: values that are read back, and copies
    from memory that is not page-locked.
    """
    found: list[list[str]] = []
    real = getattr(owner, name)

    def watched(*arguments, **named):
        waits, unpinned = len(gpu.waits), len(gpu.unpinned)
        result = real(*arguments, **named)
        # keep: bitsandbytes brings its table of numbers, 256 of them, when it makes its state.
        copies = [what for what in gpu.unpinned[unpinned:] if not what.startswith("(256,)")]
        found.append([*gpu.waits[waits:], *copies])
        return result

    monkeypatch.setattr(owner, name, watched)
    return found


@pytest.mark.parametrize(
    ("name", "bf16"), [*((name, True) for name in sorted(JOBS)), ("sd1", False)]
)
def test_every_family_trains_on_a_gpu_and_no_step_waits_for_it(name, bf16, tmp_path, pictures, monkeypatch):
    """A tensor left on the CPU would end the first GPU run of a user; a value read back would stall every step."""
    run = job(name, tmp_path, pictures, JOBS[name])
    with pretend_gpu(bf16=bf16) as gpu:
        steps = waits_within(gpu, monkeypatch, loop, "training_step")
        readings = waits_within(gpu, monkeypatch, Meter, "read")
        result = train(run)
        assert gpu.peak > 0
    assert result.steps == 2 and 0.5 < result.validation.value < 1.5
    # keep: with fp16 torch's scaler asks whether to take the step, unless torch's fused optimizer looks for itself.
    assert [len(waits) for waits in steps] == [0 if bf16 else 1] * run.train.steps, steps
    assert [len(waits) for waits in readings] == [2 if bf16 else 3], "one copy of the means, one of all losses"


def test_the_gpu_gives_the_numbers_of_the_cpu(tmp_path, pictures):
    """Else the pretended one would prove little; in fp32 only the order of sums differs."""
    found = []
    for device in ("cpu", "cuda"):
        run = job("sd1", tmp_path / device, pictures, {"model": {"dtype": "fp32"}})
        if device == "cpu":
            found.append(train(run).adapter.tensors)
        else:
            with pretend_gpu():
                found.append(train(run).adapter.tensors)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_what_cuda_refuses_is_refused():
    """Tensors of two devices, and numbers read back, are what the tests above live on."""
    with pretend_gpu() as gpu:
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="same device"):
            _ = there + here
        assert (there + torch.tensor(1.0)).sum().item() == 12.0
        assert len(gpu.waits) == 1 and not gpu.unpinned
        there.copy_(here)
        there.copy_(here.pin_memory(), non_blocking=True)
        assert len(gpu.unpinned) == 1
        layer = nn.Linear(3, 3).to("cuda")
        with torch.autocast("cuda", torch.float16):
            made = layer(there)
        made.float().sum().backward()
        assert made.dtype == torch.float16 and layer.weight.grad.device.type == "cuda"


@pytest.mark.parametrize(("bf16", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_what_the_gpu_computes_in(bf16, chosen):
    """A T4 claims bf16 and emulates it."""
    with pretend_gpu(bf16=bf16):
        accelerator, dtype = build.build_accelerator("auto", ())
        assert (dtype, accelerator.device.type) == (chosen, "cuda")
    assert (accelerator.scaler is not None) == (chosen == "fp16")


def test_bf16_on_a_gpu_that_emulates_it_is_refused(tmp_path, pictures):
    """It would be many times slower than fp16, and nothing would say why."""
    run = job("sd1", tmp_path, pictures, {"model": {"dtype": "bf16"}})
    with pretend_gpu(bf16=False), pytest.raises(ConfigError) as caught:
        train(run)
    assert "Tesla T4" in caught.value.problems[0] and "model.dtype=auto" in caught.value.problems[0]


def test_a_gradient_that_overflows_at_any_scale_stops_the_run():
    """fp16 skips such a step; a run of skipped steps would train nothing and look as if it did."""
    with pretend_gpu(bf16=False):
        accelerator, _ = build.build_accelerator("fp16", ())
        accelerator.scaler.scale(torch.ones((), device="cuda"))
        meter = Meter(accelerator, Policy())
        number = torch.ones((), device="cuda")
        meter.add(0, StepResult(number, number, number > 0, number, ()), [])
        assert meter.read(lambda step: []).values["loss"] == 1.0
        accelerator.scaler.update(0.5)
        meter.add(1, StepResult(number, number, number > 0, number, ()), [])
        with pytest.raises(NumericError, match="overflows in fp16"):
            meter.read(lambda step: [])


def test_a_frozen_t5_encodes_as_for_the_cache(tmp_path):
    """It has dropout, which training would switch on: the same caption would mean something else in every step."""
    family, parts = load_family(str(write_twin("flux", tmp_path)))
    parts.text_encoders["text_encoder"].requires_grad_(True)
    model = TrainableModel(family, parts.denoiser, parts.text_encoders).train()
    assert model.training and model.denoiser.training and model.text_encoders["text_encoder"].training
    assert not any(part.training for part in model.text_encoders["text_encoder_2"].modules())


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 4, 3, padding=1, bias=False)], ids=["linear", "conv"])
def test_int8_layers_round_each_row_by_its_own_largest_weight(layer):
    """Half a step of 1/127 of the largest is the most that a weight is off, forwards and backwards."""
    weight = layer.weight.detach().clone()
    held_in_int8(layer.requires_grad_(False), torch.float32)
    rounded = layer.weight * layer.scale
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().max() == 127
    assert ((rounded - weight).abs() <= largest / 127 * 0.5001).all()
    x = torch.randn((2, 6) if weight.ndim == 2 else (2, 3, 8, 8), requires_grad=True)
    own = nn.functional.linear if weight.ndim == 2 else nn.functional.conv2d
    wanted = own(x, rounded, layer.bias) if weight.ndim == 2 else own(x, rounded, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), wanted)
    (made,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(made, torch.autograd.grad(wanted.square().sum(), x)[0])


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_full_memory_is_told_in_words_whoever_found_it(said):
    """torch has an error of its own for it, the libraries below it have not."""
    with pytest.raises(ResourceError, match="memory is full"), _memory_errors():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="another"), _memory_errors():
        raise RuntimeError("another error")


def test_the_plan_speaks_of_the_gpu(tmp_path, pictures):
    """What it says of the optimizer and of memory is for where the run will be."""
    heard: list[str] = []

    class Heard(Reporter):
        def table(self, title: str, rows: Rows) -> None:
            heard.extend([title, *(f"{label}: {value}" for label, value in rows)])

        def warn(self, text: str) -> None:
            heard.append(text)

    with pretend_gpu():
        plan_run(job("sd1", tmp_path, pictures, {}), Heard(), measure=1)
    text = "\n".join(heard)
    assert "on a CPU" not in text and "bf16 on cuda" in text and "The accelerator itself" in text
    assert "Memory, measured" in text and "16.00 GiB" in text
