from __future__ import annotations

import pytest

from finetune.families import load_family
from tests.tiny import random_adapter, tiny_pipeline

RANK, ALPHA = {"unet": 4, "text_encoder": 8}, {"unet": 2.0, "text_encoder": 24.0}
"""Unequal ranks and strengths, so that every way of confusing them shows."""


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("secret-folder") / "tiny")


@pytest.fixture(scope="session")
def base(base_folder):
    """The tiny base: (family, components). Export must not change it: see `test_base_is_untouched`."""
    return load_family(str(base_folder))


@pytest.fixture
def full_adapter(base):
    """Every convolution, attention, MLP of the denoiser and of the text encoder, far from zero."""
    return random_adapter(*base, rank=RANK, alpha=ALPHA)


@pytest.fixture
def adapter(full_adapter):
    """A part of it with a layer of every kind, for tests that need not see all."""
    full_adapter.tensors = {
        name: tensor
        for name, tensor in full_adapter.tensors.items()
        if name.startswith(("text_encoder.", "unet.mid_block.attentions", "unet.down_blocks.0.resnets.0"))
    }
    return full_adapter
