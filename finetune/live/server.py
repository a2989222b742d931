"""Serves the live page: the page itself, what the run folder says, and its sample pictures; nothing else, read only.

All addresses in the page are relative, so that it works at any path, such as behind the proxy of a notebook.
"""

from __future__ import annotations

import errno
import json
import re
import socket
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from finetune.errors import ConfigError
from finetune.live.folder import lines_since, status_of

PAGE = Path(__file__).with_name("page.html")
PICTURE = re.compile(r"/(samples/step-\d{6,}/\d{3,}-\d+\.png)")
POLICY = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def serve(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server for the page of one run folder, which need not exist yet; `serve_forever` starts it.

    Args:
        port: 0 takes any that is free; `server_port` says which.

    Raises:
        ConfigError: if nothing can listen there.
    """
    try:
        return ThreadingHTTPServer((host, port), partial(_Handler, folder))
    except (OSError, OverflowError) as error:
        here = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        raise ConfigError(
            f"The page cannot be shown at {host}:{port}: {getattr(error, 'strerror', None) or error}.",
            [
                "--host must be an address of this machine: 127.0.0.1 (only here) or 0.0.0.0 (the whole network)"
                if here
                else "choose another --port; --port 0 picks a free one"
            ],
        ) from error


class _Handler(BaseHTTPRequestHandler):
    """Answers three kinds of address."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self._folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer one request."""
        address = urlsplit(self.path)
        if address.path == "/":
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif address.path == "/data":
            mark, fresh, lines = lines_since(self._folder, parse_qs(address.query).get("mark", [""])[0])
            answer = {"mark": mark, "fresh": fresh, "lines": lines, "run": status_of(self._folder)}
            self._send(json.dumps(answer).encode(), "application/json")
        elif (match := PICTURE.fullmatch(address.path)) and (self._folder / match[1]).is_file():
            self._send((self._folder / match[1]).read_bytes(), "image/png")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a page asks every other second."""
