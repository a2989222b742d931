"""Pictures made on the spot: small, smooth and different from one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Draw = Callable[..., Image.Image]
Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scans remember must not outlive a test, nor come from another one."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("memory")))


@pytest.fixture
def draw() -> Draw:
    """draw(width, height, tint): an RGB gradient without any symmetry."""

    def make(width: int = 48, height: int = 32, tint: int = 0) -> Image.Image:
        rows, columns = np.mgrid[0:height, 0:width]
        red = columns * 255 // max(1, width - 1)
        green = rows * 255 // max(1, height - 1)
        blue = np.full_like(red, (tint * 37) % 256)
        return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))

    return make


@pytest.fixture
def save(tmp_path: Path, draw: Draw) -> Save:
    """save("a/b.png", width, height, tint, caption="...", **options) under tmp_path; returns the path."""

    def make(
        name: str,
        width: int = 48,
        height: int = 32,
        tint: int = 0,
        caption: str | None = None,
        **options: Any,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(width, height, tint).save(path, **options)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make
