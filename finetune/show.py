"""A run as text: every field with its value and its meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from finetune.config import Run
from finetune.run_files import dump_run, fields_of


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
        for line in _wrap(" ".join(meaning.split()).replace("None", "null"), 110 - len(indent)):
            yield f"{indent}# {line}"
        if section and isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(section, value, indent + "  ")
        else:
            # keep: JSON is YAML, and quotes every text that YAML would read as something else.
            yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}"


def _wrap(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width - 2:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    if line:
        yield line
