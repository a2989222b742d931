"""Files with a strength behind them, as people write them: cat.safetensors@0.8."""

from __future__ import annotations

import math
from pathlib import Path

from finetune.errors import ConfigError


def parse_weighted(text: str, default: float = 1.0) -> tuple[Path, float]:
    """(path, weight) of "path@weight"; without @ the weight is `default`, and a file of that very name wins.

    Raises:
        ConfigError: if what follows the last @ is no finite number and there is no such file either.
    """
    whole = Path(text).expanduser()
    name, at, number = text.rpartition("@")
    if not at or whole.exists():
        return whole, default
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(
            f"{text} has the weight {number!r}, and there is no file of that name either; write a number behind the @: "
            "cat.safetensors@0.8."
        )
    return Path(name).expanduser(), weight
