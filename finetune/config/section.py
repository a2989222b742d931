"""What every group of fields shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen group of fields; an unknown key is an error, and so is true or false in place of a number.

    A path that begins with `~` is in the user's home, as a shell has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, so `steps: true` would train one step, and `~` for the name of a folder."""
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = {kind, *get_args(kind)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("must be a number")
        return Path(value).expanduser() if isinstance(value, str) and Path in kinds else value
