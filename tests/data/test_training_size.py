"""The sizes of pictures: `finetune data`, the plan and the training go by one rule, whatever the base."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_tools.errors import UsageError
from finetune.cli import app
from finetune.config import DataConfig
from finetune.data.dataset import load_pictures
from finetune.data.training_size import base_training_size, training_size
from finetune.errors import ConfigError, UserError
from finetune.families import FAMILIES, load_family
from finetune.families.twins import write_twin
from finetune.training.build_data import build_cut


@pytest.fixture(scope="module", params=["demo", "sd1", "sdxl", "sd3", "flux"])
def base(request, tmp_path_factory):
    """The embedded base, and twins as folders: name, and (family, components)."""
    name = request.param
    place = "demo" if name == "demo" else str(write_twin(name, tmp_path_factory.mktemp("twins") / name))
    return place, load_family(place)


@pytest.mark.parametrize("resolution", [None, 128, 512, 1024])
def test_a_base_says_the_same_without_its_weights(base, resolution):
    """`data bucket --base` reads configurations only; training asks the loaded networks."""
    place, loaded = base
    assert base_training_size(place, resolution) == training_size(*loaded, resolution)


def test_commands_and_training_cut_alike(base, tmp_path):
    """What `data bucket` and `data report` show is what is trained, picture by picture."""
    (place, loaded), folder = base, tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(350, 250), (225, 325), (160, 160), (150, 90)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    cut = build_cut(DataConfig(folder=folder), *loaded)
    trained = {p.path.name: p.placement.as_json() for p in load_pictures(folder, cut)[0]}
    bucket = CliRunner().invoke(app, ["data", "bucket", str(folder), "--base", place, "--json"], catch_exceptions=False)
    shown = {p.pop("file_name"): p for p in json.loads(bucket.stdout)["pictures"]}
    assert {name: {key: p[key] for key in trained[name]} for name, p in shown.items()} == trained
    page = tmp_path / "page.html"
    CliRunner().invoke(app, ["data", "report", str(folder), "--base", place, "-o", str(page)], catch_exceptions=False)
    reported = json.loads(page.with_suffix(".json").read_text())
    assert {p["file_name"]: p["cut"] for p in reported["pictures"]} == trained
    assert reported["plan"]["name"] == f"{cut.resolution} px in steps of {cut.multiple}"
    assert reported["captions"]["tokens"], "the base counts the tokens as well"


def test_every_family_has_a_usual_step():
    """`--base` is for certainty: without it 64 is taken, and that is what the published models grow in."""
    assert {family.bucket_multiple for family in FAMILIES.values()} == {64}


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        (["--base", "demo", "--multiple", "8"], UsageError, "leave out --multiple"),
        (["--base", "demo", "--preset", "512"], UsageError, "leave out --base"),
        (["--base", "demo", "--resolution", "100"], ConfigError, "use 96 or 112"),
        (["--base", "somebody/model"], ConfigError, "nothing is fetched for this"),
        (["--base", "nowhere.safetensors"], UserError, "neither a folder nor a file"),
    ],
)
def test_a_base_that_cannot_answer_is_told(tmp_path, options, error, word):
    """A wrong name must not end in the sizes of another model."""
    with pytest.raises(error, match=word):
        CliRunner().invoke(app, ["data", "bucket", str(tmp_path), *options], catch_exceptions=False)
