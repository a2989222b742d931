"""`finetune cache`: tells the truth about a cache, and removes only what it was asked to."""

from __future__ import annotations

import os
import time

import pytest
import torch

from finetune.data.store import DAMAGED, SHARDS
from finetune.data.views import plain
from tests.conftest import command
from tests.data.conftest import pictures_in, prepared
from tests.data.test_store import damage, fill_up


@pytest.fixture
def cache(folder, tmp_path):
    """A cache with latents of four pictures and 600 other entries."""
    prepared(pictures_in(folder), tmp_path / "run" / "cache")
    fill_up(tmp_path / "run" / "cache" / "text", 600)
    return tmp_path / "run" / "cache"


def test_a_whole_cache_is_counted(cache, capsys, monkeypatch):
    """By its run folder or by itself."""
    for name in (cache, cache.parent):
        text = command(capsys, monkeypatch, "cache", name, "--check")
        assert "latents 4 entries in 1 shard," in text and "text 600 entries in 3 shards" in text


def test_damage_is_found_and_fails_the_check(cache, capsys, monkeypatch):
    """A flipped bit in the middle of a shard is invisible to its header."""
    victim = sorted((cache / "text").glob(SHARDS))[1]
    damage(victim, "payload")
    assert "damaged" not in command(capsys, monkeypatch, "cache", cache), "without --check only headers are read"
    text = command(capsys, monkeypatch, "cache", cache, "--check", expect=3)
    assert "1 file is damaged" in text and victim.name in text and "--prune" in text
    assert victim.exists(), "looking changes nothing"


def test_prune_removes_what_nobody_reads_and_nothing_else(cache, folder, capsys, monkeypatch):
    """Damaged, set aside and half-written files go; shards, young part files and strangers stay, whatever they hold."""
    text = cache / "text"
    victim = sorted(text.glob(SHARDS))[0]
    damage(victim, "cut short")
    aside = text / f"shard-{'0' * 32}.safetensors{DAMAGED}"
    model = text / "t5xxl.safetensors"
    dead, living = text / ".shard-1.safetensors.part-1-aa", text / ".shard-2.safetensors.part-2-bb"
    strange = text / "my.txt"
    for path in (aside, model, dead, living, strange):
        path.write_bytes(b"x" * 100)
    os.utime(dead, (time.time() - 7200,) * 2)
    shards = set(cache.rglob(SHARDS)) - {victim}
    printed = command(capsys, monkeypatch, "cache", cache, "--prune")
    assert "removed 3 files" in printed and "2 not of the cache, left alone" in printed
    assert "damaged" not in printed, "what is gone is no longer counted"
    assert not any(path.exists() for path in (victim, aside, dead))
    assert living.exists() and strange.exists() and model.exists() and shards == set(cache.rglob(SHARDS))
    latents = prepared(pictures_in(folder), cache)
    assert torch.isfinite(latents.get(plain(pictures_in(folder)[0])).mean).all()


def test_unused_shards_are_named_and_go_only_when_asked(cache, folder, capsys, monkeypatch):
    """A shard counts as used from the start of the last run that wanted it."""
    for path in cache.rglob(SHARDS):
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    prepared(pictures_in(folder), cache)
    assert "3 unused" in command(capsys, monkeypatch, "cache", cache, "--unused", 30)
    assert len(list(cache.rglob(SHARDS))) == 4
    assert "removed 3 files" in command(capsys, monkeypatch, "cache", cache, "--prune", "--unused", 30)
    assert [path.parent.name for path in cache.rglob(SHARDS)] == ["latents"]


def test_another_folder_is_refused_in_words(tmp_path, capsys, monkeypatch):
    """A typing error must not be told that its cache is fine."""
    assert "neither a run folder with a cache nor a cache" in command(
        capsys, monkeypatch, "cache", tmp_path, "--check", expect=3
    )
    assert "cannot be combined" in command(capsys, monkeypatch, "cache", tmp_path, "--check", "--prune", expect=2)


def test_folders_of_others_are_no_cache(tmp_path, capsys, monkeypatch):
    """Models lie in folders called `text`, masks in `masks`: --prune must not take either for its own."""
    model = tmp_path / "models" / "text" / "t5xxl.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    command(capsys, monkeypatch, "cache", tmp_path / "models", "--prune", expect=3)
    assert model.read_bytes() == b"weights"


def test_a_pipe_among_the_shards_is_not_waited_for(cache, capsys, monkeypatch):
    """Opening a pipe blocks until somebody writes."""
    os.mkfifo(cache / "text" / f"shard-{'1' * 32}.safetensors")
    assert "600 entries" in command(capsys, monkeypatch, "cache", cache, "--check")
