"""The command line: `python -m data_tools ...`, mounted by the toolkit as `finetune data ...`.

Commands raise `DataToolsError`; `main` prints it without a traceback and exits with its code.
"""

from __future__ import annotations

import sys

from rich.console import Console

from data_tools.cli import bucket, caption, clean, edit, importing, mask, report, scan, tokens
from data_tools.cli.app import app
from data_tools.errors import DataToolsError

COMMANDS = (importing, scan, caption, edit, tokens, mask, clean, bucket, report)
"""Modules whose import puts their commands on the application; the help lists them in this order, that of the work."""
_ORDER = [module.__name__ for module in COMMANDS]
app.registered_commands.sort(key=lambda registered: _ORDER.index(registered.callback.__module__))


def main() -> None:
    """Run the command line; print errors that are the user's to mend as text."""
    try:
        app(prog_name="data_tools")
    except DataToolsError as error:
        Console(stderr=True).print(error.text(), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


__all__ = ["COMMANDS", "app", "main"]
