"""The only source of randomness: every draw is a function of what it is for, never of what was drawn before.

A draw is keyed by (seed, purpose, ids), for instance (run seed, "noise", epoch, file name). So a resumed run needs no
saved generator state, and one process or eight, with any number of workers, see the same noise for the same picture.
"""

from __future__ import annotations

import hashlib
import random

import torch


def seed_for(seed: int, purpose: str, *ids: int | str) -> int:
    """A 63-bit seed that depends on every argument and on nothing else (stable across processes and versions)."""
    key = "\x1f".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def rng(seed: int, purpose: str, *ids: int | str) -> torch.Generator:
    """A CPU generator for one purpose. Draw on the CPU and move the result: every device sees the same values."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *ids))


def python_rng(seed: int, purpose: str, *ids: int | str) -> random.Random:
    """The same for choices and shuffles of Python objects."""
    return random.Random(seed_for(seed, purpose, *ids))


def seed_libraries(seed: int, *ids: int | str) -> None:
    """Key the global generators that libraries draw from (dropout inside an adapter) to this step of this run.

    Our own code never draws from them; this only makes what the libraries draw repeatable after a resume.
    """
    torch.manual_seed(seed_for(seed, "libraries", *ids))
