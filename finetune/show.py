"""A run as text: every field with its value and its meaning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from finetune.config import Run
from finetune.run_files import dump_run, fields_of

WIDTH = 110
"""Characters of a line."""


def annotated_yaml(run: Run) -> str:
    """The run as YAML that can be trained as it is, each field under its meaning."""
    head = "# Train with: finetune train THIS_FILE   (any field: --set section.field=value)\n"
    return head + "\n".join(_lines(Run, dump_run(run), "")) + "\n"


def _lines(model: type[BaseModel], document: dict[str, Any], indent: str) -> Iterator[str]:
    for name, section in fields_of(model).items():
        value = document[name]
        meaning = model.model_fields[name].description or (section.__doc__ if section else "") or ""
        if not indent:
            yield ""
        for line in _wrap(" ".join(meaning.split()).replace("None", "null"), WIDTH - len(indent)):
            yield f"{indent}# {line}"
        if section and isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(section, value, indent + "  ")
        else:
            yield from _value(f"{indent}{name}:", value, indent)


def _value(name: str, value: Any, indent: str) -> Iterator[str]:
    """One line; a list that is longer than a line is broken between its items."""
    # keep: JSON is YAML, and quotes every text that YAML would read as something else.
    line = f"{name} {json.dumps(value, ensure_ascii=False)}"
    if isinstance(value, list) and len(line) > WIDTH:
        items = [json.dumps(item, ensure_ascii=False) for item in value]
        broken = list(_filled([*(f"{item}," for item in items[:-1]), f"{items[-1]}]"], WIDTH - len(indent)))
        yield f"{name} ["
        yield from (f"{indent}  {part}" for part in broken)
    else:
        yield line


def _wrap(text: str, width: int) -> Iterator[str]:
    yield from _filled(text.split(), width)


def _filled(words: Iterable[str], width: int) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + 1 + len(word) > width - 2:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    if line:
        yield line
