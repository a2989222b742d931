"""The live page shows what the run folder holds, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from finetune import make_run
from finetune.live.folder import lines_since, status_of
from finetune.live.server import PAGE, serve
from finetune.run_files import dump_run
from finetune.tracking import MetricsLog
from finetune.training.lock import hold
from tests.conftest import command

PROMPTS = ["a sks dog", "<b>bold</b> & \"quoted\""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run after 30 of 60 steps with two sample sheets."""
    folder = tmp_path / "my <run>"
    folder.mkdir()
    run = make_run(
        {"model": {"base": "demo"}, "data": {"folder": "photos"}, "train": {"steps": 60}, "output_dir": str(folder)}
    )
    (folder / "run.json").write_text(json.dumps(dump_run(run)))
    log = MetricsLog(folder / "metrics.jsonl", -1)
    log.write(0, {"validation/ratio": 1.0, "validation/error": 0.0})
    for step in range(1, 31):
        judged = {"validation/ratio": 0.8, "validation/error": 0.1} if step % 15 == 0 else {}
        log.write(step, {"loss": 1 / step, "grad_norm": 0.5, "seconds_per_step": 2.0, "learning_rate": 1e-4} | judged)
    for step in (0, 30):
        sheet = folder / "samples" / f"step-{step:06d}"
        sheet.mkdir(parents=True)
        for i in range(len(PROMPTS)):
            Image.new("RGB", (8, 8), "red").save(sheet / f"{i:03d}-0.png")
        (sheet / "questions.json").write_text(json.dumps({"prompts": PROMPTS, "per_prompt": 1}))
    return folder


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Where the page of that run is served."""
    with serve(folder, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read()


def test_only_new_and_complete_lines_are_given(folder: Path) -> None:
    """A page that asks every other second must not be sent thousands of lines, nor half a line."""
    mark, fresh, lines = lines_since(folder, "")
    assert fresh and [line["step"] for line in lines] == list(range(31))
    assert lines_since(folder, mark) == (mark, False, [])
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 31, "loss"')
    assert lines_since(folder, mark) == (mark, False, [])
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(": 0.5}\n")
    assert lines_since(folder, mark)[1:] == (False, [{"step": 31, "loss": 0.5}])


def test_a_run_that_goes_on_earlier_replaces_what_was_shown(folder: Path) -> None:
    """Steps that are done again would stand twice in the curves."""
    mark, _, _ = lines_since(folder, "")
    MetricsLog(folder / "metrics.jsonl", 10).write(11, {"loss": 7.0})
    _, fresh, lines = lines_since(folder, mark)
    assert fresh and [line["step"] for line in lines] == list(range(12))
    assert lines_since(folder, "nonsense")[1:] == (True, lines)


def test_what_the_run_does_is_said(folder: Path, tmp_path: Path) -> None:
    """Whether to wait, to start it again, or to look at the result."""
    assert status_of(tmp_path / "not yet")["phase"] == "waiting"
    with hold(folder):
        assert status_of(folder)["phase"] == "training"
        (folder / "metrics.jsonl").rename(folder / "away")
        assert status_of(folder)["phase"] == "preparing"
        (folder / "away").rename(folder / "metrics.jsonl")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (folder / ".lock").write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname()}))
    assert status_of(folder)["phase"] == "stopped"
    (folder / ".lock").write_text(json.dumps({"pid": 1, "host": "another machine"}))
    assert status_of(folder)["phase"] == "training", "its log is being written"
    os.utime(folder / "metrics.jsonl", (1e9, 1e9))
    assert status_of(folder)["phase"] == "stopped"
    (folder / "adapter.safetensors").touch()
    assert status_of(folder)["phase"] == "finished"


def test_the_page_asks_for_nothing_by_an_absolute_address() -> None:
    """Behind a notebook's proxy the page lies at /user/me/proxy/8780/, and the machine may be offline."""
    text = PAGE.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?:|(?:src|href|action)=\"/|fetch\(\"/", text) == []


def test_run_and_samples_are_served_and_nothing_else(address: str, folder: Path) -> None:
    """The folder holds weights and settings that are nobody else's business."""
    assert fetch(address) == PAGE.read_bytes()
    answer = json.loads(fetch(f"{address}data?mark="))
    assert len(answer["lines"]) == 31 and answer["run"]["steps"] == 60 and answer["run"]["name"] == "my <run>"
    assert [(sheet["step"], sheet["prompts"]) for sheet in answer["run"]["sheets"]] == [(0, PROMPTS), (30, PROMPTS)]
    picture = "samples/step-000030/001-0.png"
    assert fetch(f"{address}{picture}?123") == (folder / picture).read_bytes()
    for path in ("run.json", "samples/../run.json", "../", "samples/step-000030/questions.json", "samples/", "x",
                 "samples/step-000031/000-0.png", "%2e%2e/run.json", "samples/step-000030/..%2frun.json"):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(address + path)
        assert refused.value.code == 404, path


def test_a_port_that_is_taken_is_said_with_the_way_out(capsys, monkeypatch, folder: Path) -> None:
    """The usual case is a page that still runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = command(capsys, monkeypatch, "watch", folder, "--port", port, expect=2)
    assert f"127.0.0.1:{port}: Address already in use" in text and "--port 0 picks a free one" in text


class Proxy(BaseHTTPRequestHandler):
    """What a notebook puts before a port: a path that is taken off."""

    target = ""

    def do_GET(self) -> None:
        prefix = "/user/me/proxy/8780"
        if not self.path.startswith(prefix):
            self.send_error(404)
            return
        with urllib.request.urlopen(self.target + self.path.removeprefix(prefix).lstrip("/")) as answer:
            self.send_response(200)
            for name in ("Content-Type", "Content-Security-Policy"):
                if answer.headers[name]:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.read())

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_works_in_a_browser_behind_a_proxy(address: str, tmp_path: Path) -> None:
    """Numbers, curves and pictures arrive; a script of the page that fails shows here; names are text, never HTML."""
    handler = type("ToTheRun", (Proxy,), {"target": address})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        done = subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=4000", "--dump-dom", f"http://127.0.0.1:{proxy.server_port}/user/me/proxy/8780"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        proxy.shutdown()
    dom = done.stdout
    assert "30 / 60" in dom and "validation, ± 0.1" in dom
    assert dom.count('class="curve"') == 4 and dom.count("<img") == 4
    assert "/user/me/proxy/8780/samples/step-000030/001-0.png?" in dom
    assert "&lt;b&gt;bold" in dom and "<b>bold" not in dom and "<h1 id=\"name\">my &lt;run&gt;</h1>" in dom
