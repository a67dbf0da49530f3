"""The agent's small window: `/healthz`, `/livez`, `/status` and `/metrics`, on the standard library.

No authentication, and it shows names of sources, times and messages: it belongs on 127.0.0.1, or on a network
of its own. It only reads.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar

from backupd.errors import UsageError
from backupd.log import mask
from backupd.model import Json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Text:
    """A page that is no JSON."""

    content: bytes
    content_type: str


Answer = tuple[bool, "Json | Text"]
"""Good (200) or not (503), and what tells why."""


class StatusServer:
    """Answers `GET /<name>` for every page while its context lasts.

    Raises UsageError where the address cannot be used.
    """

    def __init__(self, address: tuple[str, int], pages: dict[str, Callable[[], Answer]]) -> None:
        self._host, self._port = address
        self._pages = pages
        self._server: _Server | None = None
        self.url = ""
        """Where it answers, once entered."""

    def __enter__(self) -> StatusServer:
        kind = type("Handler", (_Handler,), {"pages": self._pages})
        try:
            self._server = (_Server6 if ":" in self._host else _Server)((self._host, self._port), kind)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {_bracketed(self._host)}:{self._port}: {error.strerror or error}",
                hint="another agent may be running; set serve.listen to a free address",
            ) from error
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="web", daemon=True
        ).start()
        host, port = self._server.server_address[:2]
        self.url = f"http://{_bracketed(str(host))}:{port}"
        log.info("health at %s/healthz", self.url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def probe(url: str, *, timeout: float = 5.0) -> int:
    """The exit code of a health check: 0 when the page answers 200, 1 for everything else."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        return 1
    # no proxy from the environment: the agent asks itself
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            return 0 if answer.status == HTTPStatus.OK else 1
    except (OSError, ValueError):  # URLError and HTTPError are OSErrors
        return 1


def _json(what: Json) -> Text:
    return Text((mask(json.dumps(what, indent=2)) + "\n").encode(), "application/json")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, _request: object, client_address: object) -> None:
        log.debug("a request from %s broke off", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    pages: ClassVar[dict[str, Callable[[], Answer]]] = {}
    timeout = (
        10  # seconds that a client may take over its request; a slow one holds one thread, not the agent
    )
    server_version = "backupd"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        page = self.pages.get(self.path.split("?", 1)[0].strip("/"))
        what: Json | Text
        if page is None:
            what = {"error": "no such page", "pages": [f"/{name}" for name in sorted(self.pages)]}
            status = HTTPStatus.NOT_FOUND
        else:
            try:
                good, what = page()
            except Exception as error:
                log.exception("the page %s failed", self.path)
                good, what = False, {"status": "failing", "error": f"{type(error).__name__}: {error}"}
            status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        shown = what if isinstance(what, Text) else _json(what)
        self.send_response(status)
        self.send_header("Content-Type", shown.content_type)
        self.send_header("Content-Length", str(len(shown.content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if body:
            self.wfile.write(shown.content)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
