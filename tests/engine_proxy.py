"""A Docker engine behind a proxy on TCP, as a socket proxy offers it: records which parts of it are asked."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

REQUEST = re.compile(rb"(?:^|\r\n\r\n|\n|\})(GET|HEAD|POST|PUT|DELETE) (?:/v[\d.]+)?/(\w+)\S* HTTP/1\.1\r\n")


@dataclass(slots=True)
class EngineProxy:
    """Where it listens, and what passed through it."""

    port: int
    seen: set[tuple[str, str]] = field(default_factory=set)
    """(method, first part of the path without the version)."""

    @property
    def switches(self) -> set[str]:
        """The switches of a socket proxy that would have let all of it through."""
        sections = {"PING" if part == "_ping" else part.upper() for _, part in self.seen}
        changes = any(method not in {"GET", "HEAD"} for method, _ in self.seen)
        return sections | ({"POST"} if changes else set())


@contextlib.contextmanager
def engine_proxy(path: str = "/var/run/docker.sock") -> Iterator[EngineProxy]:
    """Serve until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = EngineProxy(listener.getsockname()[1])

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed: the end
                return
            threading.Thread(target=_serve, args=(proxy, client, path), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serve(proxy: EngineProxy, client: socket.socket, path: str) -> None:
    engine = socket.socket(socket.AF_UNIX)
    engine.connect(path)
    back = threading.Thread(target=_pump, args=(engine, client, None), daemon=True)
    back.start()
    _pump(client, engine, proxy)
    back.join()
    client.close()
    engine.close()


def _pump(source: socket.socket, target: socket.socket, proxy: EngineProxy | None) -> None:
    """Bytes one way until the end; both ways of a hijacked connection close on their own."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if proxy is not None:
                # A request begins a piece here: clients send the head of each in one.
                for method, part in REQUEST.findall(data):
                    proxy.seen.add((method.decode(), part.decode()))
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
