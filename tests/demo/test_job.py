"""`finetune demo`: the main job on the embedded base. It must learn, and what it says must be true."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetune.demo import BASE_DIR
from finetune.demo.checker import load_checker
from finetune.demo.job import run_demo
from finetune.demo.prompts import subject_prompts
from finetune.demo.questions import GUIDANCE, STEPS
from finetune.demo.subjects import draw_subject
from finetune.tracking import Reporter


class Listener(Reporter):
    """Keeps every table and warning that a terminal would show."""

    def __init__(self):
        self.tables, self.warnings = {}, []

    def warn(self, text):
        self.warnings.append(text)

    def table(self, title, rows):
        self.tables[title] = list(rows)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One real demo, as `make demo` runs it."""
    folder, listener = tmp_path_factory.mktemp("demo"), Listener()
    return folder, run_demo(folder, listener), listener


def test_the_subject_is_learned_under_its_word_and_nothing_else_is_lost(demo):
    """Without the no-trigger control an overwritten class would read as a success."""
    _, summary, _ = demo
    before, after = summary["before"], summary["after"]
    assert before["with_trigger"] <= 0.05, "the base must not know the subject"
    # keep: some 30 pictures of a kind; the bounds lie between what is measured with class pictures (94, 4, -5 and 0
    # points of 376, docs/experiments.md) and without them (98, 95, -99 and -22).
    assert after["with_trigger"] >= 0.8
    assert after["without_trigger"] <= 0.2
    assert after["class_kept"] >= before["class_kept"] - 0.25
    assert after["ordinary"] >= before["ordinary"] - 0.15
    assert summary["validation"]["loss_over_base"] < 0.9


def test_everything_shown_is_in_the_summary_and_on_disk(demo):
    """summary.json holds every figure; the sheet is a picture; the plan came before the first step."""
    folder, summary, listener = demo
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert Image.open(folder / "contact_sheet.png").width > 1000
    titles = list(listener.tables)
    assert titles[0] == "Plan" and titles[-1] == "What to type next"
    learned = dict(next(rows for title, rows in listener.tables.items() if title.startswith("What was learned")))
    assert f"{summary['after']['with_trigger']:.0%}" in learned['Subject, with "sks" in the prompt']
    assert not listener.warnings, "a newcomer's first run must not begin with doubts"
    assert {item["format"] for item in summary["exports"]} == {"diffusers", "kohya", "merged"}
    for item in summary["exports"]:
        assert (folder / "exports" / item["path"]).exists()
        assert all(check["outputs_relative"] <= check["outputs_limit"] for check in item["verified"])


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "merged"])
def test_plain_diffusers_draws_the_subject_from_the_files(demo, layout):
    """What a user does next, without a line of ours: the exported file shows the subject."""
    folder, _, _ = demo
    exports = folder / "exports"
    base = exports / "merged" if layout == "merged" else BASE_DIR
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if layout == "diffusers":
        pipe.load_lora_weights(exports, weight_name="pytorch_lora_weights.safetensors")
    if layout == "kohya":
        pipe.load_lora_weights(exports, weight_name="sks-robot.safetensors")
    prompts = [item.prompt for item in subject_prompts()[:6]]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images
    verdicts = load_checker().judge(images)
    assert sum(verdict.object == "sks robot" for verdict in verdicts) >= 4


def test_the_checker_knows_the_subject_and_only_the_subject():
    """A judge that is not validated proves nothing."""
    checker = load_checker()
    subject = checker.judge([draw_subject("robot", 1000 + i) for i in range(40)])
    assert sum(verdict.object == "sks robot" for verdict in subject) >= 38
