"""Sample sheets: what a person looks at while a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from finetune import train
from finetune.errors import ConfigError
from finetune.run_files import make_run
from finetune.sampling.grid import Row, contact_sheet
from finetune.training import samples


def test_prompts_of_a_kohya_file_are_drawn_as_they_say_and_every_step_stands_in_one_sheet(document, tmp_path):
    """A prompt file people have is read as it is; what changes between steps is seen side by side."""
    lines = tmp_path / "prompts.txt"
    lines.write_text("# ours\na sks robot\na red circle --w 96 --h 64 --d 7 --s 3 --l 1 --n blurry\n", "utf-8")
    document["samples"] = {"prompts": str(lines), "per_prompt": 2, "inference_steps": 2, "every": 2}
    run = make_run(document)
    assert run.samples.prompts[0] == "a sks robot", "the run holds the prompts themselves"
    train(run)
    folder = run.output_dir / "samples"
    names = ["000-0.png", "000-1.png", "001-7.png", "001-8.png"]
    for step in (0, 2, 4):
        assert sorted(path.name for path in folder.glob(f"step-{step:06d}/*.png")) == names
    sizes = []
    for name in ("000-0.png", "001-7.png"):
        with Image.open(folder / "step-000000" / name) as image:
            sizes.append(image.size)
    assert sizes == [(64, 64), (96, 64)]
    with Image.open(folder / "step-000004.png") as sheet, Image.open(folder / "steps.png") as steps:
        assert steps.width == sheet.width and steps.height > sheet.height, "three rows, not two"
    before = (folder / "steps.png").read_bytes()
    shutil.copytree(folder / "step-000004", folder / "step-000009")
    train(run)
    assert not (folder / "step-000009").exists(), "a step that is done again may look otherwise"
    assert (folder / "steps.png").read_bytes() == before


def test_a_prompt_that_comes_later_keeps_the_steps_before(document):
    """Who goes on with one prompt more wants to see it beside what was drawn so far, not instead of it."""
    asked = {"prompts": ["a sks robot", "a red circle"], "per_prompt": 1, "inference_steps": 2, "every": 2}
    document |= {"samples": asked, "optimizer": {"schedule": "constant"}, "validation": {"every": 0}}
    train(make_run(document))
    asked |= {"prompts": ["a blue square", "a sks robot"]}
    document["train"] |= {"steps": 6}
    run = make_run(document)
    train(run)
    folder = run.output_dir / "samples"
    expected = {
        "base model": ["step-000000/000-0.png", "step-000000/001-0.png"],
        "step 2": [None, "step-000002/000-0.png"],
        "step 4": [None, "step-000004/000-0.png"],
        "step 6": ["step-000006/000-0.png", "step-000006/001-0.png"],
    }
    rows = [
        Row(label, [name and Image.open(folder / name).convert("RGB") for name in names])
        for label, names in expected.items()
    ]
    with Image.open(folder / "steps.png") as sheet:
        assert sheet.tobytes() == contact_sheet(rows, columns=asked["prompts"]).tobytes()


@pytest.mark.parametrize("sheets", [1, 2, 12, 13, 100])
def test_the_sheet_of_all_steps_stays_readable(sheets):
    """A hundred rows are no picture for an eye, and drawing them would hold up the training."""
    folders = [Path(f"step-{step:06d}") for step in range(sheets)]
    shown = samples._spread(folders)
    assert len(shown) == len(set(shown)) == min(sheets, samples.MOST_ROWS)
    assert shown == sorted(shown) and (shown[0], shown[-1]) == (folders[0], folders[-1])


def test_settings_that_cannot_be_meant_are_refused_with_the_run(document, tmp_path):
    document["samples"] = {"prompts": ["a robot --w wide", "a robot --q 3"]}
    with pytest.raises(ConfigError, match=r"(?s)'wide', which must be.*--q, which is not known here"):
        make_run(document)
    document["samples"] = {"prompts": str(tmp_path / "none.txt")}
    with pytest.raises(ConfigError, match=r"none\.txt': there is no such text file"):
        make_run(document)
