"""Help teaches, the shell completes, versions are told; all without the slow imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from typer.main import get_command

from data_tools.cli.help import folded
from finetune.cli import PANELS, app, command_name
from finetune.cli.app import complete_field, complete_recipe
from finetune.cli.options import choice
from finetune.errors import ConfigError
from finetune.run_files import load_run, recipe_names
from finetune.show import annotated_yaml
from tests.conftest import command

COMMANDS = {name: found for name, found in get_command(app).commands.items() if name != "data"}
NO_EXAMPLE = {"init"}
"""Its first line is one."""


def test_the_help_lists_every_command_once_where_it_belongs():
    """A command that stands in no panel would be lost at the end."""
    named = [command_name(registered) for registered in (*app.registered_commands, *app.registered_groups)]
    assert sorted(named) == sorted(name for names in PANELS.values() for name in names)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_how_it_is_typed_and_explains_every_option(name):
    """An option without a word, or a command without an example, sends the reader to the source."""
    found = COMMANDS[name]
    assert name in NO_EXAMPLE or re.search(rf"(?m)^( +|Example: )finetune {name}\b", found.help), found.help
    assert not [parameter.name for parameter in found.params if not (getattr(parameter, "help", "") or "").strip()]
    for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", " ".join(re.findall(rf"finetune {name} .*", found.help))):
        assert any(flag in parameter.opts for parameter in found.params), f"the example shows {flag}"


def test_paragraphs_fill_the_line_and_examples_keep_theirs():
    """Line breaks of the source are not the terminal's."""
    text = "First\n    line.\n\n    Second\n    line.\n\n    Examples:\n\n      a -b\n    "
    assert folded(text) == "First line.\n\nSecond line.\n\nExamples:\n\n  a -b"


def test_switches_take_no_value_in_the_help(capsys, monkeypatch):
    """`--low-memory <bool>` makes people write --low-memory true."""
    shown = command(capsys, monkeypatch, "sample", "--help")
    assert "--low-memory" in shown and "<bool>" not in shown


def test_versions_are_told_without_importing_anything():
    """The first question about any fault; the answer must not take ten seconds."""
    code = (
        "import sys\nfrom finetune.cli import main\nsys.argv = ['finetune', '--version']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"(?m)^finetune \d", done.stdout) and re.search(r"(?m)^diffusers \d", done.stdout)


def test_ctrl_c_while_the_command_is_imported_is_no_crash(tmp_path):
    """The first second of every command; whoever notices a typo presses it then."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "--help"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "Interrupted before anything began.\n")


def test_python_and_notebooks_are_spared_what_libraries_tell_their_developers():
    """Two complaints about packages that nothing here needs would be the first thing a notebook shows."""
    code = "import finetune\nfinetune.load_family('demo')"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_shell_completes_commands_and_choices():
    """As bash asks typer: the words so far, and which one is being typed."""

    def completed(*words):
        place = str(len(words) - 1)
        asked = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": place}
        code = "from finetune.cli import app; app(prog_name='finetune')"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | asked
        )
        return done.stdout.split()

    assert completed("finetune", "tr") == ["train"]
    assert completed("finetune", "convert", "a", "b", "--to", "k") == ["kohya"]


def test_recipes_files_and_fields_are_completed(tmp_path, monkeypatch):
    """Built-in names, recipe files, folders to look into; and all 'section.field=' of --set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd.yaml").write_text("")
    (tmp_path / "sd.txt").write_text("")
    (tmp_path / "sdruns" / "mine").mkdir(parents=True)
    (tmp_path / "sdruns" / "mine" / "run.json").write_text("{}")
    assert complete_recipe("sd") == [*(name for name in recipe_names() if name.startswith("sd")), "sd.yaml", "sdruns/"]
    assert complete_recipe("sdruns/") == ["sdruns/mine"]
    assert complete_field("adapter.r") == ["adapter.rank="]


def test_a_choice_answers_a_misspelt_name_with_the_nearest():
    """Not "invalid value"."""
    option = choice("layout", ("kohya", "peft"), "--to")
    assert option.parser("peft") == "peft"
    with pytest.raises(ConfigError, match="did you mean kohya"):
        option.parser("koyha")


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_a_printed_recipe_fits_the_screen(name):
    """One line of 6,000 characters hides the hundred that matter."""
    lines = annotated_yaml(load_run(name)).splitlines()
    assert max(map(len, lines)) <= 120
