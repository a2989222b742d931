from __future__ import annotations

import pytest

from finetune.families import load_family
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(base_folder):
    """A fresh tiny base: (family, components)."""
    return load_family(str(base_folder))
