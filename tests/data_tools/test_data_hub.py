"""A machine without a network is told so at once, and one with a network is asked as ever."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from data_tools.hub import only_fetched


class Refusing(BaseHTTPRequestHandler):
    """A hub that has no such model."""

    asked = 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, asked in place of the real one."""
    Refusing.asked = 0
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers_is_asked(hub, tmp_path):
    """Whatever its answer: who asks for the files tells what is wrong. A folder is nobody's business."""
    assert not only_fetched("some/model")
    asked = Refusing.asked
    assert asked > 0
    assert not only_fetched(str(tmp_path))
    assert Refusing.asked == asked


def test_without_a_network_one_question_is_enough(hub, monkeypatch, caplog):
    """The hub's client would ask six times per file and wait 23 seconds between."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:1")
    assert only_fetched("some/model")
    assert "Retrying" not in caplog.text


def test_a_user_who_wants_no_network_is_obeyed(hub, monkeypatch):
    """HF_HUB_OFFLINE means that nobody is asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert only_fetched("some/model")
    assert Refusing.asked == 0
