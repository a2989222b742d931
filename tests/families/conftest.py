"""A twin of every family, loaded once per session."""

from __future__ import annotations

import pytest

from finetune.families import FAMILIES, load_family
from tests.tiny import write_twin


@pytest.fixture(scope="session")
def twin_folders(tmp_path_factory):
    """Family -> folder of its twin."""
    root = tmp_path_factory.mktemp("twins")
    return {name: write_twin(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="session")
def twins(twin_folders):
    """Family -> (family, components) of its twin; nobody may change them."""
    return {name: load_family(str(folder)) for name, folder in twin_folders.items()}
