"""Workers: results in order, a death costs one file, and nothing of them is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from data_tools import images, inspection, masking
from data_tools.errors import RefusedError
from data_tools.pool import FORKS, count_of, in_threads, in_workers
from data_tools.scan import scan
from tests.data_tools import tiny_captioners
from tests.data_tools.test_data_clean import run

__all__ = ["run"]

forks = pytest.mark.skipif(not FORKS, reason="processes are forked on Linux only")


def no_death(thing: int, code: int) -> int:
    raise AssertionError(f"a worker died at {thing} with {code}")


@pytest.mark.parametrize("workers", [1, 3, 50, None])
def test_results_come_in_order_whoever_is_first(workers):
    """A manifest must not depend on which core was free."""

    def work(number: int) -> int:
        time.sleep(0.002 * (number % 5))
        return number * number

    assert list(in_workers(work, range(40), workers, no_death)) == [n * n for n in range(40)]
    assert list(in_threads(work, range(40), workers)) == [n * n for n in range(40)]
    assert list(in_workers(work, [], workers, no_death)) == []


def test_an_error_in_a_worker_is_the_callers(tmp_path):
    """A disk that fails, or our own mistake, must look as it does without workers."""

    def refuse(number: int) -> int:
        raise RefusedError(f"is {number}", "why", "remedy", 5) if number == 7 else ZeroDivisionError(number)

    with pytest.raises(ZeroDivisionError, match="0"):
        list(in_workers(refuse, range(3), 2, no_death))
    with pytest.raises(RefusedError, match="is 7; why; remedy") as caught:
        list(in_workers(refuse, [7], 2, no_death))
    assert caught.value.code == 5


@forks
def test_a_death_costs_one_thing_and_the_neighbours_are_done():
    """Two workers, three deadly things among forty: the rest must not notice."""

    def work(number: int) -> object:
        if number in (0, 1, 20):
            ctypes.string_at(0)
        if number == 39:
            os._exit(3)
        return number

    results = list(in_workers(work, range(40), 2, lambda number, code: (number, code)))
    deaths = {0: (0, -signal.SIGSEGV), 1: (1, -signal.SIGSEGV), 20: (20, -signal.SIGSEGV), 39: (39, 3)}
    assert results == [deaths.get(number, number) for number in range(40)]


@forks
def test_what_dies_only_beside_others_is_done_alone(tmp_path):
    """The system kills for memory whoever is largest; the same file alone may well fit."""

    def work(number: int) -> int:
        mark = tmp_path / "killed once"
        if number == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert list(in_workers(work, range(12), 3, no_death)) == list(range(12))


@forks
def test_no_worker_outlives_its_call(tmp_path):
    """Stopped in the middle (Ctrl-C, an error, enough thumbnails), all of them end at once."""

    def work(number: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0 if number == 0 else 60)
        return number

    results = in_workers(work, range(4), 3, no_death)
    assert next(results) == 0
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 30
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_workers_are_as_many_as_the_cores_of_this_process():
    """Eight processes of a launcher with eight workers each would be 64 on one machine."""
    alone = count_of(None, {})
    assert 1 <= alone <= 8 and count_of(None, {"LOCAL_WORLD_SIZE": "1000"}) == 1
    assert count_of(20, {}) == 20 and count_of(None, {"LOCAL_WORLD_SIZE": "x"}) == alone


@forks
def test_a_picture_that_crashes_the_decoder_is_named_and_the_scan_goes_on(run, tmp_path, save, monkeypatch):
    """A decoder's segmentation fault must not take a night's scan along, nor be a reason to name another file."""
    for number in range(12):
        save(f"set/{number:02d}.png", tint=number, caption="x")
    deadly = (tmp_path / "set/03.png").read_bytes()
    whole = inspection.decode

    def decode(data: bytes, background):
        return ctypes.string_at(0) if data == deadly else whole(data, background)

    monkeypatch.setattr(inspection, "decode", decode)
    result = scan(tmp_path / "set")
    (problem,) = result.of("error")
    assert problem.file_name == "03.png" and "Segmentation fault" in problem.what and len(result.records) == 11
    said = run("scan", tmp_path / "set")
    assert said.returncode == 3 and "03.png: kills the process that decodes it (Segmentation fault)" in said.stderr
    monkeypatch.setattr(inspection, "decode", whole)
    assert run("scan", tmp_path / "set").returncode == 0, "another decoder may cope: a death is not remembered"


@forks
@pytest.mark.parametrize("command", ["caption", "mask"])
def test_captions_and_masks_survive_a_crash(run, tmp_path, monkeypatch, command):
    """Started again it would crash again at the same picture, and nobody would know which."""
    module, options = masking, ["--alpha"]
    if command == "caption":
        (tmp_path / "model").mkdir()
        tiny_captioners.wd_tagger(tmp_path / "model")
        module, options = images, ["--captions", "wd_tagger", "--model", tmp_path / "model"]
    pixels = np.zeros((64, 64, 4), np.uint8)
    for name in ("a.png", "b.png", "c.png"):
        pixels[10:30, 10:30] = ord(name[0])
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "set" / name)
    whole, deadly = module.decode, (tmp_path / "set/b.png").read_bytes()

    def decode(data: bytes, *background):
        return ctypes.string_at(0) if data == deadly else whole(data, *background)

    monkeypatch.setattr(module, "decode", decode)
    result = run(command, tmp_path / "set", *options)
    assert result.returncode == 3 and "b.png: kills the process that decodes it (Segmentation fault)" in result.stderr
    ending = "txt" if command == "caption" else "png"
    assert f"a.{ending}" in result.stdout and f"c.{ending}" in result.stdout and f"b.{ending}" not in result.stdout


@forks
def test_a_picture_too_large_for_the_memory_stops_no_other(tmp_path, save, monkeypatch):
    """The kernel's answer to too large a picture is SIGKILL; the message must say memory."""
    for name in ("a.png", "b.png", "c.png"):
        save(f"set/{name}", tint=ord(name[0]), caption="x")
    whole, deadly = inspection.decode, (tmp_path / "set/b.png").read_bytes()

    def decode(data: bytes, background):
        if data == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(data, background)

    monkeypatch.setattr(inspection, "decode", decode)
    (problem,) = scan(tmp_path / "set").of("error")
    assert problem.file_name == "b.png" and "more memory" in problem.why and "smaller" in problem.remedy
