"""Every method in every family: carried exactly and read back, or refused with what can carry it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from finetune.adapters.files import TOKENS, AdapterFile
from finetune.adapters.methods import METHODS
from finetune.errors import ConfigError
from finetune.export.adapter import carried_by
from finetune.export.errors import ExportError
from finetune.export.exporting import export
from finetune.export.interchange import architecture, to_interchange
from finetune.export.job import Job, ModelInfo
from finetune.export.run import export_run
from finetune.families import load_family
from finetune.interchange.carrying import CARRIERS, automatic, obstacles
from finetune.interchange.reading import read_adapter
from finetune.run_files import make_run
from finetune.storage import read_safetensors
from tests.campaigns.export import trained
from tests.tiny import random_adapter, write_twin


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(family, method) -> (adapter, family, components), made once."""
    made = {}

    def make(family, method):
        if (family, method) not in made:
            folder = tmp_path_factory.getbasetemp() / f"base-{family}"
            if not folder.exists():
                write_twin(family, folder)
            made[family, method] = (trained(*load_family(str(folder)), method), *load_family(str(folder)))
        return made[family, method]

    return make


@pytest.mark.parametrize(
    ("family", "method", "formats"),
    [
        ("sdxl", "lora", ["kohya", "single-file"]),
        ("sd1", "dora", ["diffusers", "peft"]),
        ("sd1", "loha", ["kohya"]),
        ("sd1", "lokr", ["kohya", "peft"]),
        ("sd1", "ia3", ["kohya", "peft"]),
        ("sd3", "lora", ["kohya", "diffusers"]),
        pytest.param("sd1", "oft", ["peft", "merged"], marks=pytest.mark.slow),
        pytest.param("sd1", "full", ["merged", "single-file", "kohya"], marks=pytest.mark.slow),
        pytest.param("flux", "lora", ["kohya", "diffusers", "single-file"], marks=pytest.mark.slow),
    ],
)
def test_methods_read_back(adapters, tmp_path, family, method, formats):
    """What the layout can say, its readers understand: outputs differ by the order of sums alone."""
    for done in export(*adapters(family, method), tmp_path, name="toy", formats=formats):
        assert done.verification
        for check in done.verification:
            assert check.weights_relative < 1e-5
            assert check.outputs_relative < 1e-5 < check.effect


def test_sdxl_is_named_as_its_original_network_in_kohya_layout(adapters, tmp_path):
    """sd-scripts runs SDXL's original UNet, and A1111 does not find every layer under diffusers' names."""
    export(*adapters("sdxl", "lora"), tmp_path, name="toy", formats=["kohya"])
    tensors, metadata = read_safetensors(tmp_path / "toy.safetensors")
    assert any(name.startswith("lora_unet_input_blocks_") for name in tensors)
    assert any(name.startswith("lora_te2_text_model_encoder_layers_0") for name in tensors)
    assert not any("down_blocks" in name for name in tensors)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_what_a_layout_cannot_say_is_refused_with_what_can(adapters, tmp_path):
    """Readers disagree on DoRA in kohya layout; a file that looks right and is not would be worse than none."""
    with pytest.raises(ExportError, match="kohya layout cannot carry") as caught:
        export(*adapters("sd1", "dora"), tmp_path, name="toy", formats=["kohya"])
    text = caught.value.text()
    assert "programs read it differently" in text
    assert "--format diffusers, --format peft, --format merged" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("sd1", method) for method in ("rslora", "dora", "loha", "ia3", "oft", "full")),
        *(("sd3", method) for method in ("lora", "lokr", "full")),
        *(pytest.param(family, method, marks=pytest.mark.slow)
          for family in ("sd2", "sdxl", "sd3", "flux") for method in METHODS),
    ],
)  # fmt: skip
def test_what_layouts_store_is_known_before_there_is_a_file(adapters, family, method):
    """A run is refused, or its formats are chosen, by the table; the writers have the last word."""
    job = Job(*adapters(family, method), "toy", torch.float32, ModelInfo())
    names = job.file.header.method, job.file.layers(), architecture(job)
    adapter = to_interchange(job)
    can = set(carried_by(job, adapter))
    assert {layout for layout in CARRIERS if not obstacles(layout, *names)} == can
    assert set(automatic(*names)) <= {*can, "merged"}


def test_without_named_formats_an_adapter_is_exported_in_what_stores_it(adapters, tmp_path):
    """A LoHa is nothing for diffusers' loader; a run that was paid for must not end without a file for that."""
    done = export(*adapters("sd1", "loha"), tmp_path, name="toy")
    assert [item.format for item in done] == ["kohya", "peft"]


def test_a_program_that_reads_none_of_the_written_formats_is_told_of(adapters, tmp_path, tmp_path_factory):
    """SD3's fused layers leave a LoKr only PEFT, which is known once the base is loaded; no silence then."""
    file, _, components = adapters("sd3", "lokr")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    dataclasses.replace(file, header=dataclasses.replace(file.header, base_digest=components.digest)).save(
        run_folder / "adapter.safetensors"
    )
    base = tmp_path_factory.getbasetemp() / "base-sd3"
    run = make_run({"model": {"base": str(base)}, "data": {"folder": str(tmp_path)}, "output_dir": str(run_folder)})
    (tmp_path / "models" / "loras").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Nothing was installed into comfyui:.* does not read peft"):
        export_run(run_folder, run, program=f"comfyui:{tmp_path}")
    assert (run_folder / "exports" / "peft").is_dir() and not list((tmp_path / "models" / "loras").iterdir())


def test_a_loss_that_is_allowed_is_measured_and_told(adapters, tmp_path):
    """A LoRA of rank 2 in place of a DoRA: the share that is lost stands in the file."""
    (done,) = export(*adapters("sd1", "dora"), tmp_path, name="toy", formats=["kohya"], lossy=2)
    _, metadata = read_safetensors(done.path)
    assert 0.01 < done.lost < 1
    (told,) = json.loads(metadata["finetune.lossy"])
    assert told["total"] == pytest.approx(done.lost, abs=1e-6)
    assert "rank 2" in told["cause"]


def words(base):
    """An adapter of the text encoder that learned a word of two vectors."""
    file = random_adapter(*base, rank={"text_encoder": 4}, alpha={"text_encoder": 4.0})
    width = base[1].text_encoders["text_encoder"].config.hidden_size
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(1)) * 0.1
    header = dataclasses.replace(file.header, tokens=("<robot>",), trigger_words=("<robot>",))
    return dataclasses.replace(file, tensors={**file.tensors, f"text_encoder.{TOKENS}.0": vectors}, header=header)


def test_learned_words_go_beside_adapters_and_into_folders(base, tmp_path):
    """diffusers refuses a kohya file with bundled words; each program has its own place for them."""
    file = words(base)
    done = {item.format: item for item in export(file, *base, tmp_path, name="toy", formats=["kohya", "merged"])}
    tensors, metadata = read_safetensors(tmp_path / "embeddings" / "robot.safetensors")
    assert torch.equal(tensors["emb_params"], file.tensors[f"text_encoder.{TOKENS}.0"])
    assert metadata["modelspec.trigger_phrase"] == "<robot>"
    assert done["embeddings"].verification[0].weights_max_abs == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    ids = pipeline.tokenizer("<robot>", add_special_tokens=False).input_ids
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids[0]], tensors["emb_params"][0])
    found = read_adapter(tmp_path / "toy.safetensors", tmp_path / "merged").tokens["<robot>"]
    assert torch.equal(found["text_encoder"], tensors["emb_params"]), "the adapter file says where its words lie"


def test_a_format_that_words_alone_leave_empty_is_told_of(base, tmp_path):
    """Asked for a kohya file, a folder of embeddings alone looks like a mistake."""
    file = words(base)
    alone = {name: tensor for name, tensor in file.tensors.items() if TOKENS in name}
    header = dataclasses.replace(file.header, method={}, rank={}, alpha={})
    (done,) = export(AdapterFile(alone, header), *base, tmp_path, name="toy", formats=["kohya"])
    assert done.format == "embeddings"
    assert any("nothing to export as kohya" in note for note in done.notes)


@pytest.mark.parametrize(("detail", "there"), [("minimal", False), ("public", False), ("full", True)])
def test_metadata_says_as_much_as_was_asked(base, adapter, tmp_path, detail, there):
    """Who publishes decides what readers learn; how to load it is always said."""
    info = ModelInfo(detail=detail, configuration={"train": {"steps": 3}}, optimizer="adamw", author="me")
    export(adapter, *base, tmp_path, name="toy", formats=["kohya"], info=info)
    _, metadata = read_safetensors(tmp_path / "toy.safetensors")
    assert ("finetune.run" in metadata) == there
    assert ("ss_optimizer" in metadata) == (detail != "minimal")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.author"] == "me"
    assert not there or json.loads(metadata["finetune.run"]) == {"train": {"steps": 3}}
