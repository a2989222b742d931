"""Prompts with settings of their own behind them, as kohya's sample files write them: a red house --w 768 --s 30."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError


def _at_least(lowest: float, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = convert(text)
        if not lowest <= value < 2**63:
            raise ValueError(text)
        return value

    return read


OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "n": ("negative_prompt", str, "words"),
    "w": ("width", _at_least(8, int), "pixels, 8 or more"),
    "h": ("height", _at_least(8, int), "pixels, 8 or more"),
    "d": ("seed", _at_least(0, int), "a whole number from 0 up"),
    "l": ("guidance_scale", _at_least(0, float), "a number from 0 up"),
    "s": ("steps", _at_least(1, int), "a whole number from 1 up"),
}
"""Letter -> (setting, how its value is read, what it must be), as in the sample prompt files of kohya's sd-scripts."""


UNREAD = {
    r"\bBREAK\b": "BREAK, A1111's sign for a new chunk of tokens, which is not read here; write a comma instead",
    r"<(?:lora|lyco|hypernet):[^>]*>": "an adapter in A1111's way; leave it out and name the file: --adapter FILE@0.8",
    r"\[[^\[\]]*:[^\[\]]*:\s*[\d.]+\s*\]": "a change of prompt in mid-drawing in A1111's way, which is not read here; "
    "put a backslash before its brackets to mean them plainly",
}
"""What other programs read in prompts and would be drawn as words here -> what to do about it."""


def parse_prompt(text: str) -> tuple[str, dict[str, Any]]:
    """The prompt, and the settings behind it under the names of `generate`'s arguments, and seed, of the first picture.

    Raises:
        ConfigError: naming every setting that is not known or has an impossible value.
    """
    prompt, *settings = re.split(r"(?:^|\s+)--(?=[A-Za-z])", text.strip())
    found: dict[str, Any] = {}
    problems = [] if prompt else [f"{text.strip()!r} has no prompt before its settings."]
    problems += [f"{text.strip()!r} has {why}." for mark, why in UNREAD.items() if re.search(mark, prompt)]
    for setting in settings:
        letter, _, value = setting.partition(" ")
        if letter not in OPTIONS:
            known = ", ".join(f"--{name} {what}" for name, (_, _, what) in OPTIONS.items())
            problems.append(f"{text.strip()!r} has --{letter}, which is not known here; known: {known}.")
            continue
        name, read, what = OPTIONS[letter]
        try:
            found[name] = read(value.strip())
        except ValueError:
            problems.append(f"{text.strip()!r} has --{letter} {value.strip()!r}, which must be {what}.")
    if problems:
        raise ConfigError("The prompt cannot be read:", problems)
    return prompt, found


def prompt_problems(prompts: Iterable[str]) -> list[str]:
    """What is wrong with prompts and the settings behind them."""
    found: list[str] = []
    for prompt in prompts:
        try:
            parse_prompt(prompt)
        except ConfigError as error:
            found += error.problems
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; empty lines and lines that begin with # are none.

    Raises:
        ConfigError: if the file cannot be read or has no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ConfigError(f"The prompts in {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The prompts in {path} cannot be read: it is not UTF-8 text.") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt; write one per line.")
    return prompts
