"""The data features as a run uses them: together, through the trainer, on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import make_run, train
from finetune.demo.subjects import write_subject_pictures
from finetune.errors import ConfigError
from finetune.tracking import Reporter
from tests.data.test_store import damage


class Listener(Reporter):
    """Keeps what a run says."""

    def __init__(self):
        self.warned, self.rows = [], {}

    def warn(self, text):
        self.warned.append(text)

    def table(self, title, rows):
        self.rows |= dict(rows)


@pytest.fixture
def everything(document, tmp_path):
    """A run with masks, class rows, a validation folder, and everything that varies."""
    folder = tmp_path / "own"
    write_subject_pictures(folder, 6)
    lines = []
    for path in sorted(folder.glob("*.png")):
        text = path.with_suffix(".txt")
        lines.append({"file_name": path.name, "text": text.read_text().strip().replace("sks", "[trigger]") + ", a, b"})
        text.unlink()
    lines[0] |= {"loss_weight": 0.5, "repeats": 2}
    lines[1] |= {"role": "class", "text": "a {red|blue} robot"}
    lines[2] |= {"verdict": "drop"}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "masks").mkdir()
    masked = lines[3]["file_name"]
    size = Image.open(folder / masked).size
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[: size[1] // 2] = 255
    Image.fromarray(mask).save(folder / "masks" / masked)
    write_subject_pictures(tmp_path / "validation", 2)
    for path in (tmp_path / "validation").glob("*.png"):
        picture = Image.open(path).convert("RGB")
        picture.putpixel((0, 0), (1, 2, 3))
        picture.save(path)
    document["data"] = {
        "folder": str(folder), "trigger": "sks", "shuffle_caption": True, "keep_tokens": 1, "tag_dropout": 0.2,
        "caption_dropout": 0.1, "caption_variants": 3, "flip": True, "crop": "random", "color_jitter": 0.1,
        "versions": 2, "unmasked_weight": 0.1,
    }  # fmt: skip
    document["validation"] = {"every": 2, "folder": str(tmp_path / "validation"), "quantiles": 2}
    document["optimizer"] = document["optimizer"] | {"schedule": "constant"}
    del document["text_encoder_adapter"]
    return document


def test_everything_at_once_trains_resumes_and_is_told(everything, tmp_path):
    """The plan names what varies; nothing is encoded twice; a stopped run goes on with the same draws."""
    whole = train(make_run(everything | {"output_dir": str(tmp_path / "whole")}), listener := Listener())
    assert "2 versions of each picture" in listener.rows["Pictures vary"]
    assert "up to 3 texts per caption" in listener.rows["Captions vary"]
    assert listener.rows["Masks"] == "1 of 5 pictures; outside counts 0.1"
    assert listener.rows["Class"] == "1 picture, weight 1"
    assert any("no mask for" in line for line in listener.warned)
    assert any("nearly the same" in line for line in listener.warned), "the validation pictures differ in one pixel"
    assert whole.judged_on.startswith("2 held-out")
    cache = {path: path.stat().st_size for path in (tmp_path / "whole" / "cache").rglob("shard-*")}
    assert {path.parent.name for path in cache} == {"latents", "masks", "text"}
    shared = everything | {"data": everything["data"] | {"cache_folder": str(tmp_path / "whole" / "cache")}}
    train(make_run(shared | {"train": shared["train"] | {"steps": 2}, "output_dir": str(tmp_path / "parts")}))
    resumed = train(make_run(shared | {"output_dir": str(tmp_path / "parts")}))
    assert all((resumed.adapter.tensors[name] == whole.adapter.tensors[name]).all() for name in whole.adapter.tensors)
    assert {path: path.stat().st_size for path in (tmp_path / "whole" / "cache").rglob("shard-*")} == cache


def test_a_damaged_cache_costs_a_warning_and_no_run(document, tmp_path):
    """Fault 48, in a run: what was damaged is encoded again, and the result is the same to the bit."""
    document["train"] = document["train"] | {"steps": 1}
    del document["text_encoder_adapter"]
    first = train(make_run(document))
    cache = Path(document["output_dir"]) / "cache"
    for path in cache.rglob("shard-*"):
        damage(path, "cut short")
    listener = Listener()
    document["data"] = document["data"] | {"cache_folder": str(cache)}
    again = train(make_run(document | {"output_dir": str(tmp_path / "again")}), listener)
    assert sum("was damaged; it is set aside" in line for line in listener.warned) == 2
    assert all((first.adapter.tensors[name] == again.adapter.tensors[name]).all() for name in first.adapter.tensors)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"validation": {"folder": "somewhere", "holdout": 2}}, "both say what to validate on"),
        ({"data": {"folder": "x", "keep_tokens": 2}}, "keeps tags from being shuffled"),
        ({"data": {"folder": "x", "caption_separator": ""}}, "data.caption_separator"),
        ({"data": {"folder": "x", "tag_dropout": 1.0}}, "data.tag_dropout=1.0"),
        ({"data": {"folder": "x", "mask": "red"}}, "data.mask='red'"),
    ],
)
def test_fields_that_cannot_work_are_refused_before_anything_is_loaded(document, values, words):
    """Each with its value and the remedy."""
    with pytest.raises(ConfigError, match=words):
        make_run(document | values)
