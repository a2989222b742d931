"""What is wrong with a command is said at once, in words, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import fields

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from PIL import Image

from finetune.cli import train
from finetune.cli.sample import BESIDE_AGAIN, Asked
from finetune.config import ModelConfig
from finetune.dtypes import DTYPES
from finetune.errors import ConfigError
from finetune.families.folders import _unfetched
from finetune.families.twins import TWINS
from finetune.interchange import choices
from finetune.interchange.commands import RULES
from finetune.interchange.merging import MERGES
from finetune.interchange.writing import WRITERS
from finetune.run_files import load_run, read_document
from finetune.sampling.edges import PREPARATIONS
from finetune.sampling.wanted import DEPTH, PREPARED, Wanted
from finetune.training.lock import hold
from tests.conftest import command

REFUSED = {
    "sample": (2, "there is no prompt"),
    "sample x --run {tmp}/nope": (2, "There is no run folder at"),
    "sample x --run {tmp}/runs/mone": (2, "(did you mean {tmp}/runs/mine?)"),
    "sample x --base nosuch -a {tmp}/no.safetensors --strengths 1,b --steps 0": (2, "'b' where a number belongs"),
    "sample x --base nosuch -a {tmp}/no.safetensors --image {tmp}/no.png": (2, "is neither a folder nor a file here"),
    "sample --from {tmp}/text.txt": (2, "cannot be read as a PNG"),
    "sample --from {tmp}/plain.png": (2, "does not say how it was made"),
    "train {tmp}/run.yaml --set data.folder={tmp}/nope --set model.base=nosuch": (2, "nor a hub id"),
    "train {tmp}/run.yaml --set data.folder={tmp}/nope": (3, "is no folder of pictures"),
    "train {tmp}/run.yaml --set data.folder={tmp} --set output_dir={tmp}/x": (2, "lies in data.folder="),
    "train {tmp}/run.yaml --set adapter.method=loha --set export.formats=[diffusers]": (2, "=[kohya, peft]"),
    "plan {tmp}/run.yaml --set adapter.method=full --set export.formats=[peft]": (2, "export.formats=[kohya], or null"),
    "train {tmp}/run.yaml --resume nevr": (2, "did you mean never?"),
    "demo --family sdx": (2, "did you mean sdxl?"),
    "train {tmp}/run.yaml --resume must": (4, "holds no checkpoint"),
    "train {tmp}/run.yaml --set output_dir={tmp}/held": (7, "is in use by process"),
    "plan {tmp}/run.yaml --set model.base=nosuch": (2, "nor a hub id"),
    "build {tmp}/run.yaml -o {tmp}": (2, "is not empty"),
    "convert {tmp}/no.safetensors {tmp}/b.safetensors --to kohya": (4, "No such file"),
    "convert {tmp}/text.txt {tmp}/b.safetensors --to koyha": (2, "did you mean kohya?"),
    "resize {tmp}/no.safetensors {tmp}/b.safetensors --rank 0": (2, "--rank 0 is not between 1 and 4096"),
    "resize {tmp}/no.safetensors {tmp}/b.safetensors --energy 0.0": (2, "--energy 0 is not a share between 0 and 1"),
    "merge {tmp}/no.safetensors -o {tmp}/b.safetensors --rank 0": (2, "--rank 0 is not between"),
    "merge {tmp}/no.safetensors --into {tmp}/nope -o {tmp}/b.safetensors": (4, "No such file"),
    "extract {tmp}/no.safetensors {tmp}/nein.safetensors {tmp}/b.safetensors": (4, "nein.safetensors cannot be read"),
    "diff {tmp}/no.safetensors {tmp}/nein.safetensors": (4, "nein.safetensors cannot be read"),
    "export {tmp}/unfinished": (4, "its run is not finished"),
    "export {tmp}/unfinished --checkpoint 3": (4, "holds no checkpoint of step 3"),
    "export {tmp}/nope": (2, "There is no run folder at"),
    "inspect {tmp}/text.txt": (4, "it is a text, perhaps a pointer of git-lfs or a web page"),
    "watch {tmp}/held --host no.such.host.invalid": (2, "--host"),
    "init nosuch": (2, "There is no recipe"),
}
"""Command -> its exit code and some of what it says."""
CODE = """
import contextlib, io, json, sys
from finetune.cli import main
answers = []
for line in json.load(sys.stdin):
    sys.argv, told = ["finetune", *line.split()], io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.suppress(SystemExit) as ended:
        try:
            main()
        except SystemExit as end:
            answers.append([end.code, " ".join(told.getvalue().split()), "torch" in sys.modules])
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Every refused command in one process without torch: command -> (exit code, words, whether torch was needed)."""
    tmp = tmp_path_factory.mktemp("refused")
    (tmp / "text.txt").write_text("hello, I am a text\n")
    Image.new("RGB", (8, 8)).save(tmp / "plain.png")
    (tmp / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp / "photos" / "a.png")
    (tmp / "runs" / "mine").mkdir(parents=True)
    (tmp / "runs" / "mine" / "run.json").write_text("{}")
    run = {"model": {"base": "demo"}, "data": {"folder": str(tmp / "photos")}, "output_dir": str(tmp / "new" / "run")}
    (tmp / "run.yaml").write_text(json.dumps(run))
    (tmp / "unfinished").mkdir()
    (tmp / "unfinished" / "run.json").write_text(json.dumps(run))
    commands = [text.format(tmp=tmp) for text in REFUSED]
    with hold(tmp / "held"):
        before = sorted(tmp.rglob("*"))
        done = subprocess.run(
            [sys.executable, "-c", CODE], input=json.dumps(commands), capture_output=True, text=True, check=False,
            env=os.environ | {"COLUMNS": "500"},
        )  # fmt: skip
        assert sorted(tmp.rglob("*")) == before, "something was left behind"
    assert done.returncode == 0, done.stderr
    return tmp, dict(zip(REFUSED, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("text", REFUSED)
def test_what_needs_no_torch_is_refused_without_it(answers, text):
    """Eight seconds of imports before "there is no prompt" is how a tool loses its user."""
    tmp, answered = answers
    code, words, torch_was_imported = answered[text]
    assert (code, torch_was_imported) == (REFUSED[text][0], False), words
    assert REFUSED[text][1].format(tmp=tmp) in words


def test_all_that_is_wrong_with_a_request_is_said_at_once(answers):
    """One start, every mistake: bad numbers, missing files and contradictions together."""
    words = answers[1]["sample x --base nosuch -a {tmp}/no.safetensors --strengths 1,b --steps 0"][1]
    assert "'b' where a number" in words and "steps=0" in words
    words = answers[1]["sample x --base nosuch -a {tmp}/no.safetensors --image {tmp}/no.png"][1]
    assert "no.safetensors does not exist" in words and "no.png is no file" in words and "model.base=nosuch" in words


def test_a_bad_host_is_not_blamed_on_the_port(answers):
    """Advice that cannot help sends the user the wrong way."""
    words = answers[1]["watch {tmp}/held --host no.such.host.invalid"][1]
    assert "--port" not in words


def test_names_to_choose_from_are_those_of_the_tables():
    """They are judged without torch, so they stand apart from the functions they name."""
    assert set(choices.LAYOUTS) == set(WRITERS)
    assert set(choices.MERGE_METHODS) == set(MERGES)
    assert set(choices.NUMBER_FORMATS) == set(DTYPES)
    assert set(choices.SHARES) == set(RULES)
    assert set(PREPARED) == {*PREPARATIONS, DEPTH}
    assert list(TWINS) == list(train.TWINS)


def test_every_option_of_sample_goes_somewhere():
    """A field that neither `Wanted` nor the model takes must be one of those that are read into them."""
    taken = {field.name for field in fields(Wanted)} | set(ModelConfig.model_fields)
    read = {"words", "prompts_file", "output", "again", "run", "adapter", "factors", "second_base", "control_picture"}
    read |= {"of_base"}
    assert {field.name for field in fields(Asked)} - taken == read
    assert {field.name for field in fields(Asked)} >= BESIDE_AGAIN


def test_a_setting_beside_from_is_refused_though_it_is_the_default(capsys, monkeypatch, tmp_path):
    """--seed 0 was meant; the picture's own seed would be taken in silence."""
    text = command(capsys, monkeypatch, "sample", "--from", tmp_path / "x.png", "--seed", 0, expect=2)
    assert "--seed cannot be chosen beside it" in text


WRONG = {
    "train.steps=abc": "train.steps='abc': must be a whole number",
    "train.steps=10:30": "train.steps='10:30': must be a whole number",
    "train.batch_size=0": "train.batch_size=0: must be at least 1",
    "adapter.method=lorra": "adapter.method='lorra': is not known (did you mean lora?); choose one of lora, rslora,",
    "adapter.alpha=x": "adapter.alpha='x': must be a number",
    "adapter=3": "adapter=3: is a section; set its fields one by one (method, rank, alpha, ...)",
    "data.flip=maybe": "data.flip='maybe': must be true or false",
    "data.folder=": "data.folder=null: must be a path",
    "export.formats=kohya": "export.formats='kohya': must be a list: [first, second]",
    "tokens={words: 3}": "tokens.words=3: must be a mapping: {name: value}",
    "objective.noise_range=[1]": "objective.noise_range has too few values: number 2 is missing",
    "samples.prompts=a cat": "prompts themselves are a list: [a cat]",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_told_what_would_be_right(override):
    """In the words of the file that is written, not of the library that reads it."""
    with pytest.raises(ConfigError) as refused:
        load_run("sd15-lora", [override])
    assert WRONG[override] in str(refused.value)


def test_a_recipe_that_is_not_there_can_be_made(tmp_path):
    """The name ends like a file, so a file was meant; the list of built-in names would not help."""
    with pytest.raises(ConfigError, match=r"finetune init sd15-lora > .*my\.yaml"):
        load_run(tmp_path / "my.yaml")


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    """PyYAML alone reads 1e-4 as text, 10:30 as 630 and 010 as 8."""
    path = tmp_path / "numbers.yaml"
    path.write_text("a: [3, -2, 1e-4, .5, 2., .inf, 10:30, 010, 1:30.5, 0x1F]\n")
    assert read_document(path)["a"] == [3, -2, 1e-4, 0.5, 2.0, math.inf, "10:30", 10, "1:30.5", "0x1F"]


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (OfflineModeIsEnabled("Cannot reach the hub"), "the hub cannot be reached"),
        (ConnectionError("Name or service not known"), "the hub cannot be reached"),
        # keep: without its constructor, which wants an answer of the web client
        (RevisionNotFoundError.__new__(RevisionNotFoundError), "it has no such branch, tag or commit"),
    ],
)
def test_a_base_that_cannot_be_fetched_is_told_by_its_cause(cause, told):
    """diffusers speaks of its own arguments and of a stacktrace above; the cause says what to do."""
    error = OSError("model is not cached locally; check out the root cause in the stacktrace above, local_files_only")
    error.__cause__ = cause
    text = _unfetched(error)
    assert told in text and type(cause).__name__ in text
    assert "stacktrace" not in text and "local_files_only" not in text
