"""What `finetune export` makes of a run folder: whose files they are, and where they lie."""

from __future__ import annotations

import dataclasses

import pytest

from finetune.adapters.files import AdapterFile
from finetune.errors import ConfigError
from finetune.export.errors import ExportError
from finetune.export.run import export_run, exported_rows
from finetune.run_files import make_run
from tests.tiny import random_adapter


@pytest.fixture
def run(adapter, base, base_folder, tmp_path):
    """(folder, run) of a finished run of 6 steps with a checkpoint of step 4 in it."""
    folder = tmp_path / "toy"
    header = dataclasses.replace(adapter.header, base_digest=base[1].digest, step=6)
    for path, step in ((folder / "adapter.safetensors", 6), (folder / "checkpoint-000004" / "adapter.safetensors", 4)):
        path.parent.mkdir(parents=True)
        dataclasses.replace(adapter, header=dataclasses.replace(header, step=step)).save(path)
    document = {"model": {"base": str(base_folder)}, "data": {"folder": str(tmp_path)}, "output_dir": str(folder)}
    return folder, make_run({**document, "export": {"formats": ["kohya"], "dtype": "fp32"}})


def test_a_checkpoint_takes_no_other_files_place(run):
    """Step 4 under the finished adapter's name would be drawn with for weeks before somebody noticed."""
    folder, wanted = run
    export_run(folder, wanted)
    before = (folder / "exports" / "toy.safetensors").read_bytes()
    exported = export_run(folder, wanted, source=folder / "checkpoint-000004" / "adapter.safetensors")
    assert exported[0].path == folder / "exports" / "step-000004" / "toy-000004.safetensors"
    assert (folder / "exports" / "toy.safetensors").read_bytes() == before
    assert exported_rows(exported)[0] == ("Trained for", "4 steps")


def test_a_program_that_cannot_take_the_files_is_told_of_before_anything_is_loaded(run, tmp_path):
    """The base alone takes a minute."""
    folder, wanted = run
    with pytest.raises(ConfigError, match="the folder of comfyui"):
        export_run(folder, wanted.model_copy(update={"model": None}), program=f"comfyui:{tmp_path}")
    (tmp_path / "models" / "loras").mkdir(parents=True)
    (done,) = export_run(folder, wanted, program=f"comfyui:{tmp_path}")
    copied = tmp_path / "models" / "loras" / "toy.safetensors"
    assert copied.read_bytes() == done.path.read_bytes()
    assert f"installed as {copied}" in done.notes


def test_all_formats_that_cannot_be_had_are_told_at_once(run):
    """One at a time, each costs another loading of the base."""
    folder, wanted = run
    strong = {"export": wanted.export.model_copy(update={"formats": ("kohya", "diffusers"), "dtype": "fp16"})}
    file = folder / "adapter.safetensors"
    adapter = AdapterFile.read(file)
    huge = {name: tensor * 1e8 for name, tensor in adapter.tensors.items()}
    dataclasses.replace(adapter, tensors=huge).save(file)
    with pytest.raises(ExportError, match="2 formats cannot be exported") as caught:
        export_run(folder, wanted.model_copy(update=strong))
    assert caught.value.text().count("too strong for fp16") == 2 and not caught.value.done
    assert not (folder / "exports").exists() or not list((folder / "exports").iterdir())


def test_a_format_that_is_refused_keeps_no_other_from_being_written(run, base):
    """fp16 is the default and often too coarse for a merged model: the adapter file is right all the same."""
    folder, wanted = run
    weak = random_adapter(*base, rank={"unet": 8}, alpha={"unet": 8.0}, preset="attention", strength=2e-3)
    file = folder / "adapter.safetensors"
    header = dataclasses.replace(weak.header, base_digest=base[1].digest)
    dataclasses.replace(weak, header=header).save(file)
    asked = {"formats": ("kohya", "merged", "single-file"), "dtype": "fp16"}
    with pytest.raises(ExportError, match="2 formats cannot be exported") as caught:
        export_run(folder, wanted.model_copy(update={"export": wanted.export.model_copy(update=asked)}))
    text = caught.value.text()
    assert "these formats are exported and verified: kohya" in text and "--force" in text
    assert f"`finetune export {folder} -f merged -f single-file --dtype fp32`" in text
    assert {path.name for path in (folder / "exports").iterdir()} == {"toy.safetensors", "toy.json"}
