"""Verdicts: each fault is found with its number, nothing is touched, people have the last word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from PIL import Image, ImageFilter, ImageOps

from data_tools import manifest
from data_tools.clean import Options, decide, examine, judge, reset, write
from data_tools.errors import DataToolsError, UsageError
from data_tools.quality import Measures
from data_tools.records import ImageRecord
from data_tools.rules import RULES, change_rules
from data_tools.scan import scan
from data_tools.verdicts import without_dropped
from tests.conftest import ROOT
from tests.data_tools.test_data_cli import flat, run
from tests.data_tools.test_data_quality import scene

__all__ = ["run"]

FAULTS = {
    "good.png": scene,
    "good too.png": lambda: scene(seed=1),
    "copy.png": scene,
    "near.jpg": lambda: scene().resize((500, 375)),
    "mirrored.png": lambda: ImageOps.mirror(scene()),
    "small.png": lambda: scene(300, 200, 2),
    "narrow.png": lambda: scene(1000, 300, 3),
    "blurred.png": lambda: scene(seed=4).filter(ImageFilter.GaussianBlur(5)),
    "dark.png": lambda: scene(seed=5).point(lambda v: v // 8),
    "bright.png": lambda: scene(seed=6).point(lambda v: 225 + v // 9),
    "flat.png": lambda: Image.new("RGB", (400, 400), (90, 120, 140)),
    "framed.png": lambda: ImageOps.expand(scene(seed=7), (0, 80), "black"),
}
EXPECTED = {
    "copy.png": ("copy", "keep"), "good.png": ("copy", "drop"), "near.jpg": ("near_copy", "review"),
    "mirrored.png": ("near_copy", "review"), "small.png": ("small", "review"), "narrow.png": ("aspect", "review"),
    "blurred.png": ("blur", "review"), "dark.png": ("dark", "review"), "bright.png": ("bright", "review"),
    "flat.png": ("flat", "review"), "framed.png": ("bars", "review"), "good too.png": ("", "keep"),
}  # fmt: skip


def fill(folder: Path, names=tuple(FAULTS), captions: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        FAULTS[name]().save(folder / name)
        if captions:
            (folder / name).with_suffix(".txt").write_text(f"a picture, {Path(name).stem}")
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """One picture per fault; not to be written to."""
    return fill(tmp_path_factory.mktemp("faulty"))


def test_every_fault_is_found_and_nothing_else(faulty):
    """One verdict per picture, with the number and the limit that led to it."""
    before = {path: path.read_bytes() for path in faulty.iterdir()}
    found = {each.record.file_name: each for each in examine(faulty, Options()).judged}
    for name, (check, verdict) in EXPECTED.items():
        each = found[name]
        assert each.record.verdict == verdict, (name, each.record.verdict_reasons)
        if verdict != "keep":
            assert [finding.check for finding in each.findings] == [check], (name, each.findings)
            assert any(char.isdigit() for char in each.findings[0].text) or check == "copy"
    assert found["mirrored.png"].copy and found["mirrored.png"].copy.mirrored
    assert "shorter side 200 px, below 256" in found["small.png"].record.verdict_reasons[0]
    assert {path: path.read_bytes() for path in faulty.iterdir()} == before


def test_limits_and_verdicts_can_be_changed_and_mistakes_are_told_at_once(faulty):
    """What is blurred depends on what one trains; one round of corrections is enough."""
    limits = {"small": 100, "aspect": 5, "near_copy": 0}
    rules = change_rules(limits, {"blur": "keep", "flat": "drop", "copy": "review"})
    verdicts = {each.record.file_name: each.record.verdict for each in examine(faulty, Options(rules)).judged}
    assert verdicts["small.png"] == verdicts["narrow.png"] == verdicts["blurred.png"] == "keep"
    assert verdicts["flat.png"] == "drop" and verdicts["good.png"] == "review"
    with pytest.raises(UsageError) as caught:
        change_rules({"blurr": 1, "leak": 3.5, "dark": float("nan")}, {"flat": "kill"})
    assert all(word in str(caught.value) for word in ("'blurr' is no check", "leak=3.5", "dark=nan", "'kill'"))


def test_the_second_look_decodes_nothing(faulty, monkeypatch):
    """Trying other limits on 10,000 pictures must not take minutes each time."""
    first = examine(faulty, Options())
    monkeypatch.setattr("data_tools.measuring.decode", lambda *_: pytest.fail("decoded again"))
    again = examine(faulty, Options(change_rules({"blur": 1}, {})))
    assert [each.measures for each in again.judged] == [each.measures for each in first.judged]


def test_verdicts_live_in_the_manifest_and_people_have_the_last_word(tmp_path):
    """Written, changed by hand, kept through the next run, seen by training, loaded by `datasets`, taken out again."""
    folder = fill(tmp_path / "set", ("good.png", "copy.png", "flat.png", "good too.png"))
    path = write(examine(folder, Options()))
    first = path.read_bytes()
    assert write(examine(folder, Options())).read_bytes() == first
    rows = {row["file_name"]: row for row in map(json.loads, first.decode().splitlines())}
    assert rows["good.png"]["verdict"] == "drop" and rows["flat.png"]["verdict"] == "review"
    assert rows["flat.png"]["sharpness"] == 0 and rows["good too.png"]["verdict"] == "keep"
    kept, left_out = without_dropped(manifest.read(folder))
    assert [record.file_name for record in kept] == ["copy.png", "flat.png", "good too.png"]
    assert "good.png" in str(left_out[0]) and "copy.png" in str(left_out[0])

    edited = first.decode().replace('"verdict": "review"', '"verdict": "keep"').replace('"drop", "v', '"keep", "v')
    path.write_text(edited)
    again = examine(folder, Options())
    assert {each.record.verdict for each in again.judged} == {"keep"}
    assert sum(each.by_hand for each in again.judged) == 2
    write(again)
    assert {record.verdict for record in scan(folder).records} == {"keep"}
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert set(loaded["verdict"]) == {"keep"} and "set by hand" in " ".join(loaded["verdict_reasons"])
    plain = reset(folder, [each.record for each in again.judged])
    assert not any(word in plain.read_text() for word in ("verdict", "sharpness", "luma"))


def test_what_a_person_drops_is_no_reason_to_drop_its_copy(tmp_path):
    """Of two equal files one stays, whichever the person prefers."""
    folder = fill(tmp_path / "set", ("good.png", "copy.png"))
    judged = decide(examine(folder, Options()), {"copy.png": "drop"})
    assert {each.record.file_name: each.record.verdict for each in judged.judged} == {
        "copy.png": "drop", "good.png": "keep"
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"'no\.png' is not among"):
        decide(judged, {"no.png": "keep"})


def test_a_wrong_word_by_hand_is_named(tmp_path):
    """A typing mistake must not become a silent keep."""
    folder = fill(tmp_path / "set", ("good.png",))
    path = write(examine(folder, Options()))
    path.write_text(path.read_text().replace('"verdict": "keep"', '"verdict": "dorp"'))
    with pytest.raises(DataToolsError, match="has verdict 'dorp'"):
        manifest.read(folder)
    path.write_text(path.read_text().replace('"verdict": "dorp"', '"focus_x": 1.5, "focus_y": 0.5'))
    with pytest.raises(DataToolsError, match=r"focus_x=1\.5"):
        manifest.read(folder)


def test_pictures_of_the_validation_folder_are_dropped_from_training(tmp_path):
    """Exact, smaller, and mirrored ones: fault 45."""
    folder = fill(tmp_path / "train", ("copy.png", "mirrored.png", "good too.png"))
    held_out = fill(tmp_path / "held out", ("good.png",), captions=False)
    found = {each.record.file_name: each for each in examine(folder, Options(against=(held_out,))).judged}
    assert found["good too.png"].record.verdict == "keep"
    for name in ("copy.png", "mirrored.png"):
        assert found[name].record.verdict == "drop" and "held out/good.png" in found[name].record.verdict_reasons[0]


def test_judging_is_independent_of_the_folder():
    """From Python: records and numbers in, verdicts out; scores are judged by the rule of their name."""
    record = ImageRecord("a.png", 600, 600, ("x",), pixel_sha256="p", phash="0" * 16)
    measures = Measures(500, 10, 240, 0, bytes(48).hex(), "f" * 16)
    rules = {**RULES, "taste": replace(RULES["small"], limit=0.3)}
    judged = judge([record], [measures], rules, scores=[{"taste": 0.25}])
    assert judged[0].record.verdict_reasons == ("taste: score 0.250, below 0.3",)
    assert judge([record], [measures], decided=["drop"])[0].by_hand and judge([], []) == []


def test_the_command(run, tmp_path):
    """As users run it: looking, writing, deciding, taking back, for programs, and in CI."""
    folder = fill(tmp_path / "set", ("good.png", "copy.png", "flat.png"))
    looked = run("clean", folder)
    assert looked.returncode == 0 and not (folder / "metadata.jsonl").exists()
    assert "1 keep, 1 review, 1 drop" in flat(looked.stdout) and "Add --write" in looked.stdout
    assert run("clean", folder, "--strict").returncode == 3
    assert run("clean", folder, "--drop", "fl*", "--keep", "flat.png", "--write").returncode == 0
    told = json.loads(run("clean", folder, "--json").stdout)
    assert told["counts"] == {"keep": 2, "review": 0, "drop": 1}
    assert {p["file_name"]: p["by_hand"] for p in told["pictures"]}["flat.png"] is True
    assert "add --write" in run("clean", folder, "--reset").stdout
    assert run("clean", folder, "--reset", "--write").returncode == 0
    assert "verdict" not in (folder / "metadata.jsonl").read_text()


def test_a_folder_without_captions_can_be_judged_but_has_no_manifest(run, tmp_path):
    """Cleaning comes before captioning; a manifest without captions does not exist."""
    folder = fill(tmp_path / "set", ("good.png", "flat.png"), captions=False)
    assert run("clean", folder).returncode == 0
    refused = run("clean", folder, "--write")
    assert refused.returncode == 3 and "has no caption" in refused.stderr
    assert run("clean", folder, "--template", "a photo of {stem}", "--write").returncode == 0
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("x")
    assert "broken.png" in run("clean", folder, "--captions", "sidecar").stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (("--limit", "blur"), "holds no '='"),
        (("--limit", "blur=soft"), "is no number"),
        (("--limit", "shape=3"), "is no check"),
        (("--verdict", "blur=kill"), "is no verdict"),
        (("--drop", "nobody*"), "names no picture"),
        (("--against", "nowhere"), "is not there"),
        (("--score", "beauty"), "for a classifier of your own"),
        (("--score-model", "safety=x"), "--score safety is not"),
        (("--score", "safety", "--score-model", "safety=nowhere/at/all"), "cannot be loaded"),
    ],
)
def test_wrong_options_exit_2(run, tmp_path, options, words):
    """Named with what is right."""
    folder = fill(tmp_path / "set", ("good.png",))
    result = run("clean", folder, *options)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_every_command_twice_writes_the_same_bytes(run, tmp_path):
    """Idempotent, alone and in turn: where captions came from, verdicts by hand and numbers all stay."""
    folder = fill(tmp_path / "set", ("good.png", "copy.png", "blurred.png"))
    (folder / "blurred.txt").unlink()
    steps = (
        ("scan", folder, "--template", "a photo of {stem}", "--write"),
        ("clean", folder, "--drop", "good.png", "--write"),
        ("scan", folder, "--write"),
        ("clean", folder, "--write"),
        ("scan", folder, "--write"),
    )
    seen = []
    for step in steps:
        for _ in range(2):
            assert run(*step).returncode == 0
            seen.append((folder / "metadata.jsonl").read_bytes())
    assert seen[0] == seen[1] and set(seen[2:]) == {seen[2]}
    rows = {row["file_name"]: row for row in map(json.loads, seen[-1].splitlines())}
    assert {name: row["source"] for name, row in rows.items()} == {
        "blurred.png": "template", "copy.png": "sidecar", "good.png": "sidecar"
    }  # fmt: skip
    assert rows["good.png"]["verdict"] == "drop"


def test_two_processes_of_a_launcher_judge_as_one(tmp_path):
    """`accelerate launch` on `clean` and `report`: the helper leaves its share, rank 0 alone speaks and writes."""
    alone, together = fill(tmp_path / "alone"), fill(tmp_path / "together")
    environment = os.environ | {"FINETUNE_CACHE": str(tmp_path / "m")}
    command = [sys.executable, "-m", "data_tools", "clean", "--write"]
    subprocess.run([*command, alone], cwd=ROOT, env=environment, capture_output=True, check=True)
    ranks = [
        subprocess.Popen([*command, together], cwd=ROOT, env=environment | {"RANK": rank, "WORLD_SIZE": "2"},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    (said, wrong), helped = ranks[0].communicate(timeout=100), ranks[1].communicate(timeout=100)
    assert [each.returncode for each in ranks] == [0, 0] and helped == ("", ""), wrong
    assert "Wrote the verdicts" in said
    assert (together / "metadata.jsonl").read_bytes() == (alone / "metadata.jsonl").read_bytes()
    shares = sorted(len(path.read_text().split()) for path in (tmp_path / "m/measures").rglob("0000*.jsonl"))
    assert len(shares) == 3 and all(shares), "each process measured something"
    page = ["report", together, "-o", tmp_path / "page.html"]
    for rank in "10":
        subprocess.run([*command[:3], *page], cwd=ROOT, env=environment | {"RANK": rank, "WORLD_SIZE": "2"},
                       capture_output=True, check=True)  # fmt: skip
        assert (tmp_path / "page.html").exists() == (rank == "0")
