"""Reading a run: numbers, overrides, and messages that name the place, the value and the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

from finetune import config
from finetune.config import Run, differences, flatten
from finetune.errors import ConfigError
from finetune.run_files import dump_run, load_run, make_run, recipe_names, run_record
from finetune.show import annotated_yaml
from finetune.version import VERSION

SMALL = {"model": {"base": "demo"}, "data": {"folder": "pictures"}, "output_dir": "runs/x"}


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return str(caught.value)


def test_1e_4_is_a_number_in_yaml(tmp_path):
    """PyYAML reads 1e-4 as text; a learning rate that is text has cost people days."""
    path = write(tmp_path, "model: {base: demo}\ndata: {folder: p}\noptimizer: {learning_rate: 1e-4}\noutput_dir: r\n")
    assert load_run(path).optimizer.learning_rate == 1e-4


def test_yaml_means_what_it_looks_like(tmp_path):
    """PyYAML reads `off` as false and 1:30 as 90; pydantic takes true for 1. Each has changed somebody's run unseen."""
    text = "model: {base: demo}\ndata: {folder: p, mask: off}\ntrain: &t {gradient_checkpointing: yes}\noutput_dir: r\n"
    run = load_run(write(tmp_path, text))
    assert run.data.mask == "off" and run.train.gradient_checkpointing is True
    wrong = "optimizer: {learning_rate: true}\ntrain: {steps: true, max_hours: 1:30}\nexport: {name: 1.10}\n"
    with pytest.raises(ConfigError) as raised:
        load_run(write(tmp_path, "model: {base: demo}\ndata: {folder: p}\noutput_dir: r\n" + wrong))
    told = str(raised.value)
    for place in ("optimizer.learning_rate=true", "train.steps=true", "train.max_hours='1:30'"):
        assert f"{place}: must be a number" in told
    assert "export.name=1.1: must be text; put it in quotes" in told
    with pytest.raises(ConfigError, match="line 3: the key 'steps' appears twice"):
        load_run(write(tmp_path, "train:\n  steps: 3\n  steps: 4\n"))


def test_a_tilde_is_the_home_in_every_path(monkeypatch):
    """No shell sees a path in a file, and a folder called ~ is what nobody wants."""
    monkeypatch.setenv("HOME", "/home/ann")
    run = make_run(SMALL | {"output_dir": "~/runs/a", "data": {"folder": "~/photos", "cache_folder": "~/cache"}})
    assert (str(run.output_dir), str(run.data.folder), str(run.data.cache_folder)) == (
        "/home/ann/runs/a", "/home/ann/photos", "/home/ann/cache",
    )  # fmt: skip


def test_yaml_merge_keys_work(tmp_path):
    """Studios share blocks between configurations with anchors."""
    path = write(
        tmp_path,
        "model: {base: demo}\ndata: {folder: p}\noutput_dir: r\nadapter: &a {rank: 3}\n"
        "text_encoder_adapter:\n  <<: *a\n  alpha: 2\n",
    )
    run = load_run(path)
    assert run.text_encoder_adapter.rank == 3 and run.text_encoder_adapter.alpha == 2
    assert load_run(path, ["optimizer.learning_rate=3e-5"]).optimizer.learning_rate == 3e-5


def test_all_problems_are_told_at_once(tmp_path):
    """Mending one error per attempt is what people hate most about a config file."""
    text = problems(
        write(tmp_path, "model: {base: demo, dtyp: fp16}\nadapter: {rank: many}\noptimizer: {lr: 1e-4}\nrank: 4\n")
    )
    assert "model.dtyp" in text and "did you mean dtype?" in text
    assert "adapter.rank='many'" in text
    assert "did you mean learning_rate?" in text
    assert "did you mean adapter.rank?" in text
    assert "data is missing" in text and "output_dir is missing" in text


def test_a_key_that_stands_twice_is_refused(tmp_path):
    """YAML would keep the last one in silence."""
    assert "appears twice" in problems(write(tmp_path, "model: {base: demo}\nmodel: {base: other}\n"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rank", "write section.field=value"),
        ("adapter.rnak=4", "did you mean rank?"),
        ("optimizer.warmup_steps=1000", "not below train.steps=1000"),
        ("optimizer.betas=[0.9, 1.0]", "must be in [0, 1)"),
        ("data.captions=template", "needs data.caption_template"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("train.steps=0", "train.steps=0"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, expected):
    """What was typed, and what to type instead."""
    path = write(tmp_path, "model: {base: demo}\ndata: {folder: p}\noutput_dir: r\n")
    assert expected in problems(path, [override])


def test_the_trigger_must_be_learnable(tmp_path):
    """A trigger that is not in the captions, or is in the class prompts, teaches the wrong thing."""
    path = write(tmp_path, "model: {base: demo}\ndata: {folder: p, trigger: sks}\noutput_dir: r\n")
    assert "is not in data.caption_template" in problems(path, ['data.caption_template="a dog"'])
    assert "contains the trigger" in problems(path, ['data.prior={prompts: ["a sks dog"]}'])


def test_the_printed_run_is_the_run(tmp_path):
    """What `show` and `init` print must train to the same thing."""
    data = {"folder": "p: #1", "prior": {"prompts": ["a"]}}
    run = make_run(SMALL | {"text_encoder_adapter": {"rank": 4}, "data": data})
    path = write(tmp_path, annotated_yaml(run))
    assert load_run(path) == run
    assert make_run(dump_run(run)) == run


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_is_a_valid_run(name):
    """A recipe that does not parse is the worst first impression."""
    run = load_run(name)
    assert isinstance(run, Run)
    assert recipe_names()[name].read_text().startswith('"""')


def test_differences_ignore_what_does_not_touch_the_weights():
    """A resumed run may log more often or export more formats, but not change its rank."""
    run = make_run(SMALL)
    logged = make_run(SMALL | {"train": {"log_every": 1}, "output_dir": "elsewhere"})
    assert differences(run, logged) == []
    assert run.digest() == logged.digest()
    other = make_run(SMALL | {"adapter": {"rank": 32}})
    assert differences(run, other) == ["adapter.rank was 16 and is now 32"]
    assert run.digest() != other.digest()


def test_a_constant_run_may_be_made_longer():
    """Only a decaying learning rate depends on the number of steps."""
    constant = {"optimizer": {"schedule": "constant"}}
    assert differences(make_run(SMALL | constant), make_run(SMALL | constant | {"train": {"steps": 2000}})) == []
    assert differences(make_run(SMALL), make_run(SMALL | {"train": {"steps": 2000}}))


def test_flatten_names_every_leaf():
    """Dotted names are what --set takes."""
    assert flatten(make_run(SMALL))["optimizer.learning_rate"] == 1e-4


def choices(section, field):
    """The names that a field accepts."""
    kind = section.model_fields[field].annotation
    names = get_args(kind)
    while names and not isinstance(names[0], str):
        kind = next(inner for inner in names if inner not in (type(None), Ellipsis))
        names = get_args(kind)
    return set(names)


def test_what_can_be_chosen_is_what_there_is():
    """A table entry that no field accepts cannot be used; a name without an entry crashes late."""
    from data_tools.captioners import CAPTIONERS
    from finetune import objectives
    from finetune.adapters import METHODS
    from finetune.export.exporting import FORMATS
    from finetune.training.lr_schedules import LR_SCHEDULES
    from finetune.training.optimizers import OPTIMIZERS

    assert choices(config.ObjectiveConfig, "prediction") == set(objectives.PREDICTIONS)
    assert choices(config.ObjectiveConfig, "density") == set(objectives.DENSITIES)
    assert choices(config.ObjectiveConfig, "weighting") == set(objectives.WEIGHTINGS)
    assert choices(config.ObjectiveConfig, "loss") == set(objectives.LOSSES)
    assert choices(config.AdapterConfig, "method") == set(METHODS)
    assert choices(config.OptimizerConfig, "name") == set(OPTIMIZERS)
    assert choices(config.OptimizerConfig, "schedule") == set(LR_SCHEDULES)
    assert choices(config.ExportConfig, "formats") == set(FORMATS)
    assert choices(config.DataConfig, "captions") == {"auto", *CAPTIONERS}


@pytest.mark.parametrize(
    ("section", "said", "expected"),
    [
        # diffusers turns min-SNR on by the value alone
        ("objective", {"snr_gamma": 5}, "snr_gamma=5.0 is only used with objective.weighting=min_snr or soft_min_snr"),
        ("objective", {"density_mean": 1, "density": "mode"}, "with objective.density=logit_normal, and"),
        ("optimizer", {"schedule_floor": 0.1, "schedule": "constant"}, "and optimizer.schedule is constant; change"),
        ("train", {"ema_power": 0.7}, "train.ema_power=0.7 is only used if train.ema_decay is set"),
        ("samples", {"every": 6}, "samples.every=6 renders nothing, because samples.prompts is empty; set"),
        ("adapter", {"method": "ia3", "rank": 4}, "adapter.rank=4 has no meaning for adapter.method=ia3; leave it out"),
        (
            "data",
            {"folder": "p", "captions": "sidecar", "caption_template": "a sks dog"},
            "data.caption_template='a sks dog' is never used with data.captions=sidecar; set",
        ),
        ("data", {"folder": "p", "resolution": 63}, "data.resolution=63: must be a multiple of 8"),
    ],
)
def test_a_value_that_nothing_reads_is_refused(section, said, expected):
    """It was meant to turn something on; a run without it would be paid for and look the same."""
    with pytest.raises(ConfigError) as caught:
        make_run(SMALL | {section: said})
    assert expected in str(caught.value)


def test_a_whole_document_and_own_functions_may_hold_what_is_not_read():
    """A dumped run says all defaults, and a function of one's own gets every parameter."""
    assert make_run(dump_run(make_run(SMALL)))
    own = make_run(SMALL | {"objective": {"weighting": "mine.weight", "snr_gamma": 3}})
    assert own.objective.snr_gamma == 3


def test_a_folder_that_is_no_run_is_told_what_can_be_done_with_it(tmp_path):
    """Beginners name their pictures where a recipe belongs."""
    assert f"finetune train sd15-lora --set data.folder={tmp_path}" in problems(tmp_path)


def test_a_run_of_another_version_is_told_as_such(tmp_path):
    """Fields that this version does not know look like typing mistakes otherwise."""
    record = run_record(make_run(SMALL))
    assert make_run(record) == make_run(SMALL)
    path = write(tmp_path, json.dumps(record | {"finetune": "0.0.7", "speed": 3}))
    assert f"made with finetune 0.0.7, and this is {VERSION}" in problems(path)
    assert "made with" not in problems(write(tmp_path, json.dumps(record | {"speed": 3})))


def test_a_trigger_is_a_word_of_its_own():
    """sks does not stand in desks, and does stand before a comma."""
    assert config.has_word("a photo of sks, outdoors", "sks")
    assert config.has_word("a sks dog in snow", "sks dog")
    assert not config.has_word("two desks", "sks")


def test_help_answers_at_once():
    """What takes long to import is imported by the commands that need it."""
    slow = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "jinja2"}
    code = f"import sys, finetune.cli; print(sorted({slow!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    shown = subprocess.run([sys.executable, "-m", "finetune", "--help"], check=True, capture_output=True, text=True)
    assert "finetune demo" in shown.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nosuch_module\n", r"line 1: ModuleNotFoundError: No module named 'nosuch_module'"),
        ("RUN = 1\nvalue = undefined\n", r"line 2: NameError"),
        ("RUN = (\n", r"line 1: SyntaxError"),
    ],
)
def test_a_recipe_that_is_no_good_python_says_where(tmp_path, text, expected):
    """A typing error in a recipe is the user's to mend, not a traceback through our code."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_run(path)


def test_overrides_are_judged_together_with_what_they_change(tmp_path):
    """One start shows everything: a misspelt field, a wrong value and an option that is none."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {base: demo}\ndata: {folder: photos}\noutput_dir: out\n")
    with pytest.raises(ConfigError) as error:
        load_run(path, ["adapter.rnk=3", "train.steps=abc", "adapter.rank"])
    text = str(error.value)
    assert "adapter.rnk" in text and "train.steps" in text and "--set adapter.rank:" in text


def test_a_yaml_error_names_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  base: demo\n data: {\n")
    with pytest.raises(ConfigError, match="line 3: "):
        load_run(path)


def test_names_too_long_for_a_file_are_refused():
    """Else the export fails after hours of training."""
    with pytest.raises(ConfigError, match=r"too long for a file; set export\.name"):
        make_run(SMALL | {"output_dir": "runs/" + "x" * 230})
