"""Code that comes with a model is never run, whatever its configuration files ask for."""

from __future__ import annotations

import json
import shutil

import pytest

from finetune.errors import UserError
from finetune.families import load_family

EVIL = "from pathlib import Path\nPath({mark!r}).write_text('run')\nclass Evil: pass\n"


@pytest.fixture
def laced(tiny_base, tmp_path):
    """A base with code in each of its folders, and the file that the code would write."""
    folder, mark = tmp_path / "laced", tmp_path / "mark"
    shutil.copytree(tiny_base, folder)
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("evil.py", "pipeline.py"):
            (place / name).write_text(EVIL.format(mark=str(mark)))
    return folder, mark


def change(path, **entries):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | entries))


def test_auto_map_is_not_followed(laced):
    """transformers and diffusers would import the module it names, if asked to trust it."""
    folder, mark = laced
    for name in ("unet", "vae", "text_encoder"):
        change(folder / name / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    load_family(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("entry", ["unet", "text_encoder", "tokenizer"])
def test_a_part_of_a_class_of_its_own_is_refused(entry, laced):
    """model_index.json may name a module of the folder; diffusers calls that a custom component."""
    folder, mark = laced
    change(folder / "model_index.json", **{entry: ["evil", "Evil"]})
    with pytest.raises(UserError):
        load_family(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize("text", ['{"_class_name": ', "[]", ""])
def test_configuration_files_that_are_cut_off_are_named(name, text, laced):
    """An interrupted download is words, not a traceback."""
    folder, _ = laced
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=name):
        load_family(str(folder))


def test_a_pipeline_of_its_own_is_refused(laced):
    folder, mark = laced
    change(folder / "model_index.json", _class_name=["pipeline", "Evil"])
    with pytest.raises(UserError):
        load_family(str(folder))
    assert not mark.exists()
