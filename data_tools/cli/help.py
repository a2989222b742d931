"""How help is shown: paragraphs fill the line, examples keep theirs, arguments in capitals, no <bool> at a switch."""

from __future__ import annotations

import inspect
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command with such help."""

    def __init__(self, *given: Any, **named: Any) -> None:
        """See typer."""
        super().__init__(*given, **named)
        self.help = folded(self.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        """See typer."""
        return [_plain(parameter) for parameter in super().get_params(ctx)]


class Group(TyperGroup):
    """A group of commands with such help."""

    def get_params(self, ctx: Any) -> list[Any]:
        """See typer."""
        return [_plain(parameter) for parameter in super().get_params(ctx)]


class Application(typer.Typer):
    """A typer application whose commands and groups show such help."""

    def __init__(self, **settings: Any) -> None:
        """See typer."""
        super().__init__(**{"cls": Group, "no_args_is_help": True, "pretty_exceptions_enable": False, **settings})

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """See typer."""
        return super().command(name, **{"cls": Command, **settings})


def folded(text: str) -> str:
    """A docstring whose paragraphs are one line each; indented lines stand alone."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else " ".join(part.split()) for part in paragraphs)


def _plain(parameter: Any) -> Any:
    if parameter.metavar is None and getattr(parameter, "is_flag", False):
        parameter.metavar = ""
    elif parameter.metavar is None and isinstance(parameter, TyperArgument):
        parameter.metavar = parameter.name.upper()
    return parameter
