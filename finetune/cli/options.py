"""How options are declared: as fields of a dataclass, so that each is said in one place, or as one of some names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

import typer

from finetune.errors import check_choice

Options = TypeVar("Options")


def takes(options: type[Options]) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Give a function of (context, options) the parameters that typer reads: one for each field of a dataclass.

    Args:
        options: every field is `Annotated` with its typer argument or option, and has a default.
    """

    def decorate(function: Callable[[typer.Context, Options], None]) -> Callable[..., None]:
        def command(context: typer.Context, **given: Any) -> None:
            function(context, options(**given))

        kinds = get_type_hints(options, include_extras=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)] + [
            inspect.Parameter(field.name, keyword, default=field.default, annotation=kinds[field.name])
            for field in fields(options)  # type: ignore[arg-type]
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def choice(what: str, names: Sequence[str], *flags: str, **said: Any) -> Any:
    """An option that takes one of some names, completes them, and answers a misspelt one with the nearest.

    Args:
        what: what the names are of, in words.
        flags: see `typer.Option`; `said` as well.
    """

    def parse(text: str) -> str:
        check_choice(text, names, what)
        return text

    said = {"metavar": "|".join(names)} | said
    return typer.Option(*flags, parser=parse, autocompletion=lambda: list(names), **said)
