"""Fields that take a name of a table, or the import path of the user's own."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BeforeValidator

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
"""package.module.name"""


def known_or_path(names: Any, what: str, own: str) -> BeforeValidator:
    """Check a field for a name of the Literal `names` or an import path; one message for what is neither.

    Args:
        what: what the field names, in a word.
        own: what an import path may name, in words.
    """
    known = get_args(names)

    def check(value: Any) -> Any:
        if isinstance(value, str) and (value in known or IMPORT_PATH.fullmatch(value)):
            return value
        near = get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no such {what}{hint}; choose one of {', '.join(known)}, or name {own}")

    return BeforeValidator(check)
