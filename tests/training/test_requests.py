"""Stop and save on request: by signal, by file, by the clock; once each, and never in the middle of a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from finetune import make_run, train
from finetune.errors import StoppedOnRequest
from finetune.training import loop
from finetune.training.signals import SAVE_FILE, STOP_FILE, STOPPING, Requests, requests_from_signals
from tests.two_processes import answers


def test_a_file_asks_once_and_is_gone(tmp_path: Path) -> None:
    """A stop file that stayed would stop the next start as well."""
    requests = Requests(tmp_path)
    (tmp_path / STOP_FILE).touch()
    (tmp_path / SAVE_FILE).touch()
    requests.look()
    assert requests.stop == "a file named 'stop' asked for it" and requests.save
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_looked_at_twice_a_second_at_most(tmp_path: Path) -> None:
    """On a mounted drive every look is a message over the network."""
    requests = Requests(tmp_path)
    requests.look()
    (tmp_path / STOP_FILE).touch()
    requests.look()
    assert requests.stop is None
    requests._next_look = 0.0
    requests.look()
    assert requests.stop is not None


def test_files_of_an_earlier_start_are_swept(tmp_path: Path) -> None:
    """They asked a run that is gone."""
    (tmp_path / STOP_FILE).touch()
    requests = Requests(tmp_path)
    requests.sweep()
    requests.look()
    assert requests.stop is None


def test_the_clock_stops_a_run(tmp_path: Path) -> None:
    """Colab ends at its own time; ending before it costs nothing."""
    requests = Requests(tmp_path, max_hours=1e-12)
    requests.look()
    assert requests.stop == "train.max_hours=1e-12 is over"
    later = Requests(tmp_path, max_hours=1.0)
    later.look()
    assert later.stop is None


@pytest.mark.parametrize("number", STOPPING)
def test_the_second_signal_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """Who presses Ctrl-C twice means it."""
    with requests_from_signals(Requests(tmp_path)) as requests:
        requests.listening = True
        os.kill(os.getpid(), number)
        assert requests.stop == f"{number.name} came"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_who_asks_for_a_stop_is_answered(tmp_path: Path, capfd) -> None:
    """A long step or sheet may stand between Ctrl-C and its effect; silence reads as a program that hangs."""
    for speaking in (True, False):
        with requests_from_signals(Requests(tmp_path, speaking=speaking)) as requests:
            requests.listening = True
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.stop
        assert ("this step is finished and saved first" in capfd.readouterr().err) is speaking


def test_a_launchers_echo_is_no_second_signal(tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C reaches every process from the terminal and again from the launcher; both mean: finish, save, stop."""
    with requests_from_signals(Requests(tmp_path, launched=True)) as requests:
        requests.listening = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.stop == "SIGINT came"
        monkeypatch.setattr(requests, "_heard", requests._heard - 3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", STOPPING)
def test_before_the_loop_a_signal_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """Nothing is lost while the base loads, so nobody waits for it; but a scheduler must read "again later" in 75."""
    told = KeyboardInterrupt if number == signal.SIGINT else StoppedOnRequest
    with pytest.raises(told) as caught, requests_from_signals(Requests(tmp_path)):
        os.kill(os.getpid(), number)
    assert number == signal.SIGINT or f"before the first step of this start ({number.name} came)" in str(caught.value)


def test_what_one_of_two_processes_is_asked_both_do_at_the_same_step(tmp_path: Path) -> None:
    """A process that stops alone leaves the other waiting for it; one that ends before the first has saved ends it."""
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=answers, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    quiet, save, stop = (False, False), (False, True), (True, False)
    expected = [quiet, quiet, save, quiet, stop, stop]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [repr((expected, True))] * 2


def test_saving_on_request_goes_on_and_a_stop_file_ends_with_75(document, monkeypatch) -> None:
    """SIGUSR2 after step 2 leaves a checkpoint of step 2; `stop` after step 4 one of step 4; both once."""
    folder, step_of = Path(document["output_dir"]), loop.training_step
    done = 0

    def asked(*arguments):
        nonlocal done
        done += 1
        if done == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        if done == 4:
            (folder / STOP_FILE).touch()
        return step_of(*arguments)

    monkeypatch.setattr(loop, "training_step", asked)
    monkeypatch.setattr("finetune.training.signals.LOOK_SECONDS", 0.0)
    document |= {"text_encoder_adapter": None, "validation": {"every": 0}, "checkpoint": {"every": 100}}
    document["train"] |= {"steps": 50, "batch_size": 1}
    with pytest.raises(StoppedOnRequest, match=r"after step 4 of 50 \(a file named 'stop'") as caught:
        train(make_run(document))
    assert caught.value.exit_code == 75
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000004"]
