"""Every file is read back by its readers with the adapter's own outputs, or it does not exist."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import peft
import pytest
import torch

from finetune import storage
from finetune.adapters.files import DOWN, UP, AdapterFile, delta_weight
from finetune.dtypes import DTYPES
from finetune.errors import CheckpointError, ConfigError, StorageError
from finetune.export.errors import ExportError
from finetune.export.exporting import FORMATS, export
from finetune.export.job import ModelInfo
from finetune.export.verify import outputs
from finetune.families.text import installed_name
from finetune.sampling.apply import adapter_applied
from finetune.sampling.generate import build_pipeline
from finetune.storage import read_safetensors, write_safetensors
from tests.tiny import random_adapter

ALL = sorted(set(FORMATS) - {"embeddings"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class WarningsInto(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def planted(file: AdapterFile, value: float, ending: str = UP) -> AdapterFile:
    """The adapter with one tensor spoilt."""
    name = next(name for name in sorted(file.tensors) if name.endswith(ending))
    tensor = file.tensors[name].clone()
    tensor[0] = value
    return dataclasses.replace(file, tensors={**file.tensors, name: tensor})


@pytest.mark.parametrize("name", ALL)
def test_reads_back_with_equal_outputs(base, full_adapter, tmp_path, name):
    """alpha != rank, unequal ranks, convolutions: in fp32 nothing may differ but the order of sums."""
    (done,) = export(full_adapter, *base, tmp_path, name="toy", formats=[name])
    assert done.path.exists()
    assert done.bytes == sum(len(data) for data in contents(tmp_path).values())
    assert [check.reader for check in done.verification] == list(FORMATS[name].readers)
    for check in done.verification:
        assert check.modules == len(full_adapter.tensors) // 2
        assert check.weights_relative < 1e-5
        assert check.outputs_relative < 1e-5
        assert check.effect > 0.1, "the test's adapter must change enough for a lost one to show"


@pytest.mark.parametrize("name", ALL)
def test_unmerged_truth_is_independent_of_the_verifier(base, full_adapter, tmp_path, name):
    """Once more without our readers: W + alpha/r * B @ A in plain arithmetic against a user's program."""
    family, components = base
    export(full_adapter, family, components, tmp_path, name="toy", formats=[name])
    again = components_folder(base, tmp_path / "again")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged" if name == "merged" else again)
    if name == "single-file":
        pipeline = diffusers.StableDiffusionPipeline.from_single_file(
            str(tmp_path / "toy-merged.safetensors"), config=str(again), local_files_only=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    elif name == "peft":
        for network in ("unet", "text_encoder"):
            peft.PeftModel.from_pretrained(getattr(pipeline, network), str(tmp_path / "peft" / network))
    elif name != "merged":
        pipeline.load_lora_weights(str(tmp_path), weight_name=FORMATS[name].target("toy"))
    loaded = dataclasses.replace(
        components, denoiser=pipeline.unet, text_encoders={"text_encoder": pipeline.text_encoder}
    )
    expected = outputs(family, plainly_merged(base, full_adapter, tmp_path / "plain"))
    for key, tensor in outputs(family, loaded).items():
        assert float((tensor - expected[key]).abs().max() / expected[key].abs().max()) < 1e-5


def components_folder(base, folder: Path) -> Path:
    """The base once more as a folder, written by diffusers."""
    build_pipeline(*base).save_pretrained(folder)
    return folder


def plainly_merged(base, file: AdapterFile, folder: Path):
    """A second base with W + alpha/r * B @ A written into its weights."""
    _, components = base
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(components_folder(base, folder))
    with torch.no_grad():
        for component, module, down, up in file.modules():
            network = getattr(pipeline, component)
            layer = network.get_submodule(installed_name(network, component, module))
            layer.weight += (
                delta_weight(down, up) * file.header.alpha[component] / file.header.rank[component]
            )
    return dataclasses.replace(
        components, denoiser=pipeline.unet, text_encoders={"text_encoder": pipeline.text_encoder}
    )


@pytest.mark.parametrize("rank", [4, 8, 64])
@pytest.mark.parametrize("share", ["one", 0.5, 1.0, 2.0])
def test_alpha_and_rank_keep_their_meaning(base, tmp_path, rank, share):
    """diffusers' own kohya export writes alpha = rank whatever alpha was: 4 times too strong at r=4."""
    alpha = 1.0 if share == "one" else rank * share
    file = random_adapter(
        *base, rank={"unet": rank}, alpha={"unet": alpha}, preset="attention", strength=0.5 / rank
    )
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if "mid_block" in name}
    for done in export(file, *base, tmp_path, name="toy"):
        assert max(check.weights_relative for check in done.verification) < 1e-5
        assert max(check.outputs_relative for check in done.verification) < 1e-5


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_files(base, adapter, tmp_path, dtype):
    for done in export(
        adapter, *base, tmp_path, name="toy", formats=["diffusers", "kohya", "peft"], dtype=dtype
    ):
        file = next(path for path in [done.path, *done.path.rglob("*.safetensors")] if path.is_file())
        tensors, _ = read_safetensors(file)
        assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]}
        assert 1e-5 < max(check.weights_relative for check in done.verification) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_base_in_half_precision_is_its_fp32_copy_to_the_bit(base, adapter, tmp_path, dtype):
    """Export holds the base as it is stored, in half the memory; files and figures must not know."""
    family, components = base
    networks = [components.denoiser, *components.text_encoders.values()]
    narrow, copied = (
        dataclasses.replace(
            components, denoiser=made[0], text_encoders={"text_encoder": made[1]}, vae=copy.deepcopy(components.vae)
        )
        for made in ([copy.deepcopy(network).to(dtype) for network in networks] for _ in range(2))
    )
    for network in (copied.denoiser, *copied.text_encoders.values()):
        network.float()
    ours, theirs = outputs(family, narrow), outputs(family, copied)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for done in export(adapter, family, narrow, tmp_path / "a", name="toy", formats=ALL):
        assert max(check.weights_relative for check in done.verification) < 1e-5
        assert max(check.outputs_relative for check in done.verification) < 1e-5
    export(adapter, family, copied, tmp_path / "b", name="toy", formats=ALL, keep_base=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert copied.denoiser.device.type == "meta", "whole models were read back without the base in memory"


def test_weak_adapter_survives_fp16(base, tmp_path):
    """lora_B of a short run lies below 6e-5, where fp16 has few digits; so the factors are balanced."""
    file = random_adapter(*base, rank={"unet": 64}, alpha={"unet": 1.0}, preset="attention", strength=1e-4)
    (done,) = export(file, *base, tmp_path, name="toy", formats=["diffusers"], dtype="fp16")
    assert done.verification[0].weights_relative < 2e-3


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_one_network_alone(base, tmp_path, component, monkeypatch):
    """diffusers would warn of every network that the adapter leaves alone, as if something were wrong."""
    warned: list[str] = []
    logger = logging.getLogger("diffusers")
    monkeypatch.setattr(logger, "handlers", [WarningsInto(warned)])
    file = random_adapter(*base, rank={component: 4}, alpha={component: 8.0})
    assert len(export(file, *base, tmp_path, name="toy", formats=ALL)) == len(ALL)
    assert not warned, warned


def test_same_bytes_twice_and_in_another_process(base, base_folder, adapter, tmp_path):
    """The same run exported on two machines is the same artifact."""
    export(adapter, *base, tmp_path / "a", name="toy", formats=ALL)
    export(adapter, *base, tmp_path / "b", name="toy", formats=ALL)
    adapter.save(tmp_path / "adapter.safetensors")
    code = (
        "import sys; from pathlib import Path; from finetune.adapters.files import AdapterFile;"
        "from finetune.export.exporting import FORMATS, export; from finetune.families import load_family;"
        "export(AdapterFile.read(Path(sys.argv[1])), *load_family(sys.argv[2]), Path(sys.argv[3]),"
        "name='toy', formats=[n for n in sorted(FORMATS) if n != 'embeddings'])"
    )
    root = str(Path(storage.__file__).parent.parent)
    elsewhere = {"PYTHONHASHSEED": "17", "OMP_NUM_THREADS": "2", "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
    environment = {**os.environ, "PYTHONPATH": root, **elsewhere}
    arguments = [str(tmp_path / "adapter.safetensors"), str(base_folder), str(tmp_path / "c")]
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True, umask=0o077)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_key_names_are_what_readers_expect(base, adapter, tmp_path):
    """`text_model.` whatever transformers says; `lora_te_`, not `lora_te1_`, which InvokeAI skips."""
    export(adapter, *base, tmp_path, name="toy")
    kohya, _ = read_safetensors(tmp_path / "toy.safetensors")
    plain, metadata = read_safetensors(tmp_path / "pytorch_lora_weights.safetensors")
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in kohya
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in kohya
    assert "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight" in kohya
    assert not any(name.endswith(".alpha") for name in kohya), "ranks differ: none means rank"
    assert all(re.fullmatch(r"lora_(unet|te)_\w+\.(lora_(down|up)\.weight|alpha)", name) for name in kohya)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in plain
    assert all(name.endswith((DOWN, UP)) for name in plain)
    assert '"unet.r": 4' in metadata["lora_adapter_metadata"]


@pytest.mark.parametrize(
    ("value", "ending", "message"),
    [(float("nan"), UP, "not finite"), (float("inf"), DOWN, "not finite")],
)
def test_broken_tensors_are_refused_by_name(base, adapter, tmp_path, value, ending, message):
    with pytest.raises(ExportError, match=rf"encoder\.layers\.0.*{message}") as caught:
        export(planted(adapter, value, ending), *base, tmp_path / "out", name="toy", formats=ALL)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


def test_untrained_tensors_are_refused(base, adapter, tmp_path):
    """All lora_B zero is an adapter that does nothing; the user would blame the reader."""
    idle = dataclasses.replace(
        adapter, tensors={name: t * 0 if name.endswith(UP) else t for name, t in adapter.tensors.items()}
    )
    with pytest.raises(ExportError, match=r"all zero.*\n.*and \d+ more"):
        export(idle, *base, tmp_path, name="toy")
    with pytest.raises(ExportError, match="no tensors at all"):
        export(dataclasses.replace(adapter, tensors={}), *base, tmp_path, name="toy")


def test_missing_and_foreign_tensors_are_refused(base, adapter, tmp_path):
    missing = {name: t for name, t in adapter.tensors.items() if not name.endswith(f"attn1.to_q{UP}")}
    with pytest.raises(CheckpointError, match=r"attn1.to_q lacks lora_B.weight"):
        export(dataclasses.replace(adapter, tensors=missing), *base, tmp_path, name="toy")
    foreign = {name.replace("mid_block", "side_block"): t for name, t in adapter.tensors.items()}
    with pytest.raises(CheckpointError, match="the base has no such layer"):
        export(dataclasses.replace(adapter, tensors=foreign), *base, tmp_path, name="toy")


def test_overflow_is_refused_with_the_module(base, adapter, tmp_path):
    with pytest.raises(ExportError, match=r"too strong for fp16.*\n.*encoder\.layers\.0"):
        export(planted(adapter, 1e20), *base, tmp_path, name="toy", dtype="fp16")


@pytest.mark.parametrize("name", ["diffusers", "kohya", "peft", "merged"])
def test_failed_verification_leaves_no_file(base, adapter, tmp_path, monkeypatch, name):
    """A writer that is wrong by half a percent in one module is found, and the old file stays."""
    export(adapter, *base, tmp_path, name="toy", formats=[name])
    good = contents(tmp_path)
    layout = FORMATS[name]

    def slightly_wrong(job, path):
        result = layout.write(job, path)
        file = path if path.is_file() else next(path.rglob("unet/*.safetensors"))
        tensors, metadata = read_safetensors(file)
        victim = next(
            key for key in sorted(tensors) if "mid_block" in key and "to_k" in key and "alpha" not in key
        )
        write_safetensors(file, {**tensors, victim: tensors[victim] * 1.005}, metadata)
        return result

    monkeypatch.setitem(FORMATS, name, dataclasses.replace(layout, write=slightly_wrong))
    with pytest.raises(
        ExportError, match=r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_k"
    ) as caught:
        export(adapter, *base, tmp_path, name="toy", formats=[name])
    assert caught.value.exit_code == 6
    assert contents(tmp_path) == good
    with pytest.raises(ExportError):
        export(adapter, *base, tmp_path / "new", name="toy", formats=["diffusers", "kohya", name])
    others = {"diffusers", "kohya"} - {name}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {FORMATS[other].target("toy") for other in others}


def test_text_encoder_layers_diffusers_would_drop_are_refused(base, adapter, tmp_path):
    """diffusers loads a kohya file with q, v and fc1 of the text encoder and drops q and v without a word."""
    kept = ("unet.", "q_proj", "v_proj", "fc1")
    some = {name: t for name, t in adapter.tensors.items() if any(part in name for part in kept)}
    with pytest.raises(ExportError, match="q_proj is not loaded") as caught:
        export(dataclasses.replace(adapter, tensors=some), *base, tmp_path, name="toy", formats=["kohya"])
    assert "text_encoder's k_proj" in caught.value.text()
    export(
        dataclasses.replace(adapter, tensors=some), *base, tmp_path, name="toy", formats=["diffusers", "peft"]
    )


def test_full_disk_is_a_storage_error(base, adapter, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "save_config", full)
    with pytest.raises(StorageError, match="No space left"):
        export(adapter, *base, tmp_path, name="toy", formats=["diffusers", "merged"])
    assert not contents(tmp_path)


def test_base_is_untouched(base, adapter, tmp_path):
    """Training goes on with the same networks after an export in the middle of a run."""
    family, components = base
    before = [list(network.state_dict()) for network in components.modules().values()]
    weights = [t.clone() for network in components.modules().values() for t in network.state_dict().values()]
    hooks = [len(module._forward_hooks) for module in components.denoiser.modules()]
    export(adapter, *base, tmp_path, name="toy", formats=ALL)
    assert [list(network.state_dict()) for network in components.modules().values()] == before
    now = [t for network in components.modules().values() for t in network.state_dict().values()]
    assert all(torch.equal(*pair) for pair in zip(weights, now, strict=True))
    assert [len(module._forward_hooks) for module in components.denoiser.modules()] == hooks
    with adapter_applied(family, components, None):
        assert not any(module.training for module in components.denoiser.modules())


def test_mistakes_in_the_request_are_told_together(base, adapter, tmp_path):
    with pytest.raises(ConfigError) as caught:
        export(adapter, *base, tmp_path, name="../toy", formats=["khoya", "diffusers"], dtype="f16")
    assert "did you mean kohya" in caught.value.text()
    assert "did you mean fp16" in caught.value.text()
    assert "'../toy'" in caught.value.text()


def test_a_header_that_names_another_method_is_refused(base, adapter, tmp_path):
    """Folding LoRA's way would silently change what another method means."""
    header = dataclasses.replace(adapter.header, method={"unet": "dora", "text_encoder": "lora"})
    other = dataclasses.replace(adapter, header=header)
    with pytest.raises(CheckpointError, match="lacks lora_magnitude_vector"):
        export(other, *base, tmp_path, name="toy", info=ModelInfo())
