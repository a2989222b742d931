"""The error of an export that was refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from finetune.errors import UserError


class ExportError(UserError):
    """A file that would not be what the user trained; nothing is kept under its final name.

    Attributes:
        formats: names of the formats that were refused; empty where the adapter or the metadata is at fault.
        done: what was exported all the same, see `export`.
    """

    exit_code = 6

    def __init__(
        self, headline: str, problems: Iterable[str] = (), formats: Sequence[str] = (), done: Sequence[Any] = ()
    ) -> None:
        super().__init__(headline, problems)
        self.formats, self.done = tuple(formats), tuple(done)
