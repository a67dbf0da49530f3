"""An HTTP proxy that breaks what passes through it, when told to; also a slow line, for benchmarks. Standard library.

    with FaultProxy(server.endpoint) as proxy:
        proxy.fail(Fault.RESET_MIDWAY, method="PUT", path="packs/", times=2)
        ...                                   # talk to proxy.endpoint
        assert proxy.count(Fault.RESET_MIDWAY) == 2

    with FaultProxy(server.endpoint, latency=0.05, bandwidth=12_500_000): ...    # 50 ms, 100 Mbit/s each way

The Host header passes unchanged, so that signatures stay valid. `python tests/fault_proxy.py URL --latency 0.05`
runs it on its own until it is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from urllib.parse import unquote, urlsplit

PIECE = 1 << 16


class Fault(StrEnum):
    """What can go wrong with one request."""

    ERROR_500 = "500, the request not passed on"
    ERROR_503 = "503 SlowDown, the request not passed on"
    RESET_BEFORE = "connection reset before the body is taken"
    RESET_MIDWAY = "connection reset in the middle of the request's body, its first half passed on"
    HANG = "no answer ever"
    LOST_REPLY = "passed on and done; connection reset instead of the answer"
    TRUNCATED = "connection closed in the middle of the answer"
    RESET_ANSWER = "connection reset in the middle of the answer"
    FLIPPED_UP = "one bit of the request's body flipped"
    FLIPPED_DOWN = "one bit of the answer's body flipped"


@dataclass(slots=True)
class Rule:
    """The next `times` requests of this method whose path (unquoted, with query) matches get this fault."""

    fault: Fault
    method: str
    path: re.Pattern[str]
    times: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that came by."""

    method: str
    path: str
    fault: Fault | None


@dataclass(slots=True)
class Request:
    """The head of a request, as it goes on to the server."""

    method: str
    path: str
    head: bytes
    length: int
    chunked: bool
    expects: bool


class Cut(Exception):
    """The connection ended, or is to end now."""


@dataclass(slots=True)
class Line:
    """One direction of a line of `bandwidth` bytes a second, shared by all connections."""

    bandwidth: float | None
    _free: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def carry(self, size: int) -> None:
        """Return when `size` bytes have gone through."""
        if not self.bandwidth:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self.bandwidth
            wait = self._free - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class FaultProxy:
    """Listens on 127.0.0.1 while its `with` lasts; `latency` in seconds a request, `bandwidth` in bytes/s each way.

    `tls` is (certificate file, key file): clients then speak https to it, it speaks http to the server.
    """

    def __init__(
        self,
        upstream: str,
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        tls: tuple[str, str] | None = None,
        port: int = 0,
    ) -> None:
        address = urlsplit(upstream)
        self._upstream = (address.hostname or "127.0.0.1", address.port or 80)
        self._latency = latency
        self._up, self._down = Line(bandwidth), Line(bandwidth)
        self._tls: ssl.SSLContext | None = None
        if tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", port), backlog=64)
        self.seen: list[Seen] = []

    @property
    def endpoint(self) -> str:
        """Its own URL."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self._listening.getsockname()[1]}"

    def fail(self, fault: Fault, *, method: str = "", path: str = "", times: int = 1) -> None:
        """Break the next `times` requests of this method (any when empty) whose path matches a regex."""
        with self._lock:
            self._rules.append(Rule(fault, method, re.compile(path), times))

    def count(self, fault: Fault) -> int:
        """How often this fault was made."""
        with self._lock:
            return sum(seen.fault is fault for seen in self.seen)

    def clear(self) -> None:
        """Break nothing any more, and forget what came by."""
        with self._lock:
            self._rules.clear()
            self.seen.clear()

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, name="fault proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    # --- connections -------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Requests of one connection, one after another."""
        with contextlib.suppress(OSError, Cut), contextlib.ExitStack() as stack:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                client = self._tls.wrap_socket(client, server_side=True)
            stack.callback(client.close)
            left = b""
            while True:
                head, left = read_head(client, left)
                request = parse(head)
                fault = self._choose(request)
                if self._latency:
                    time.sleep(self._latency)
                left = self._pass_on(client, request, fault, left)

    def _choose(self, request: Request) -> Fault | None:
        with self._lock:
            chosen = None
            for rule in self._rules:
                if rule.times > 0 and rule.method in ("", request.method) and rule.path.search(request.path):
                    rule.times -= 1
                    chosen = rule.fault
                    break
            self.seen.append(Seen(request.method, request.path, chosen))
            return chosen

    def _pass_on(self, client: socket.socket, request: Request, fault: Fault | None, left: bytes) -> bytes:
        """One request and its answer; what was read of the next request is given back."""
        if fault is Fault.RESET_BEFORE:
            reset(client)
        if request.expects:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault in (Fault.ERROR_500, Fault.ERROR_503, Fault.HANG):
            body = Body(client, left, request)
            for _ in body.pieces():
                pass
            self._answer_badly(client, fault)
            return body.left
        with socket.create_connection(self._upstream) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.sendall(request.head)
            body = Body(client, left, request)
            sent = 0
            for piece in body.pieces():
                if fault is Fault.RESET_MIDWAY and sent + len(piece) > request.length // 2:
                    server.sendall(piece[: request.length // 2 - sent])
                    reset(client)
                if fault is Fault.FLIPPED_UP:
                    piece = flipped(piece, request.length // 2 - sent)  # noqa: PLW2901
                self._up.carry(len(piece))
                server.sendall(piece)
                sent += len(piece)
            if fault is Fault.RESET_MIDWAY:
                reset(client)
            head, rest = read_head(server, b"")
            if fault is Fault.LOST_REPLY:
                reset(client)
            self._give_back(client, server, request, fault, head, rest)
        return body.left

    def _answer_badly(self, client: socket.socket, fault: Fault) -> None:
        if fault is Fault.HANG:
            self._closed.wait(600)
            raise Cut
        status, code = {
            Fault.ERROR_500: ("500 Internal Server Error", "InternalError"),
            Fault.ERROR_503: ("503 Slow Down", "SlowDown"),
        }[fault]
        said = (
            f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>on purpose</Message></Error>'.encode()
        )
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(said)}\r\n\r\n"
        client.sendall(head.encode() + said)

    def _give_back(
        self,
        client: socket.socket,
        server: socket.socket,
        request: Request,
        fault: Fault | None,
        head: bytes,
        rest: bytes,
    ) -> None:
        """Relay the answer; the server closes after it, so that its end needs no parsing."""
        lines = head.decode("latin1").split("\r\n")
        kept = [line for line in lines if not line.lower().startswith("connection:")]
        client.sendall("\r\n".join(kept).encode("latin1") + b"\r\n\r\n")
        if request.method == "HEAD" or lines[0].split()[1] in ("204", "304"):
            return
        announced = headers_of(lines).get("content-length")
        total = int(announced) if announced is not None else None
        half = (total or 0) // 2
        sent = 0
        while total is None or sent < total:
            piece = rest or server.recv(PIECE)
            rest = b""
            if not piece:
                break
            if fault in (Fault.TRUNCATED, Fault.RESET_ANSWER) and sent + len(piece) > half:
                client.sendall(piece[: half - sent])
                if fault is Fault.RESET_ANSWER:
                    reset(client)
                raise Cut
            if fault is Fault.FLIPPED_DOWN:
                piece = flipped(piece, half - sent)
            self._down.carry(len(piece))
            client.sendall(piece)
            sent += len(piece)
        if total is None and "chunked" not in headers_of(lines).get("transfer-encoding", ""):
            raise Cut  # the end of the connection is the end of the answer


# --- HTTP ------------------------------------------------------------------------------------------------


class Body:
    """The body of a request: read from the connection, begun in `left`."""

    def __init__(self, client: socket.socket, left: bytes, request: Request) -> None:
        self._client, self._request, self.left = client, request, left

    def pieces(self) -> Iterator[bytes]:
        """As it came; chunked stays chunked. Afterwards `left` is what follows it."""
        if not self._request.chunked:
            yield from self._exactly(self._request.length)
            return
        while True:
            line = self._line()
            yield line
            size = int(line.split(b";")[0], 16)
            yield from self._exactly(size)
            yield self._line()
            if size == 0:
                return

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size > 0:
            if not self.left:
                self.left = receive(self._client)
            piece, self.left = self.left[:size], self.left[size:]
            size -= len(piece)
            yield piece

    def _line(self) -> bytes:
        while b"\r\n" not in self.left:
            self.left += receive(self._client)
        line, _, self.left = self.left.partition(b"\r\n")
        return line + b"\r\n"


def receive(connection: socket.socket) -> bytes:
    """Some bytes; raises Cut at the end."""
    data = connection.recv(PIECE)
    if not data:
        raise Cut
    return data


def read_head(connection: socket.socket, left: bytes) -> tuple[bytes, bytes]:
    """The lines up to the empty one, and what came after it."""
    while b"\r\n\r\n" not in left:
        left += receive(connection)
    head, _, left = left.partition(b"\r\n\r\n")
    return head, left


def headers_of(lines: list[str]) -> dict[str, str]:
    """Names in lower case."""
    pairs = (line.split(":", 1) for line in lines[1:])
    return {name.strip().lower(): value.strip() for name, value in pairs}


def parse(head: bytes) -> Request:
    """What the proxy must know; the head is rewritten so that the server closes after its answer."""
    lines = head.decode("latin1").split("\r\n")
    method, target, _ = lines[0].split(" ", 2)
    headers = headers_of(lines)
    kept = [line for line in lines if not line.lower().startswith(("expect:", "connection:"))]
    return Request(
        method=method,
        path=unquote(target),
        head="\r\n".join([*kept, "Connection: close"]).encode("latin1") + b"\r\n\r\n",
        length=int(headers.get("content-length") or 0),
        chunked="chunked" in headers.get("transfer-encoding", "").lower(),
        expects=headers.get("expect", "").lower() == "100-continue",
    )


def flipped(piece: bytes, at: int) -> bytes:
    """One bit changed where `at` is inside."""
    if not 0 <= at < len(piece):
        return piece
    changed = bytearray(piece)
    changed[at] ^= 1
    return bytes(changed)


def reset(connection: socket.socket) -> None:
    """End it with RST; raises Cut."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    raise Cut


def main() -> None:
    parser = argparse.ArgumentParser(description="A slow line to an HTTP server, until interrupted.")
    parser.add_argument("upstream")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds a request")
    parser.add_argument("--bandwidth", type=float, default=None, help="bytes a second, each way")
    chosen = parser.parse_args()
    with FaultProxy(
        chosen.upstream, latency=chosen.latency, bandwidth=chosen.bandwidth, port=chosen.port
    ) as proxy:
        print(proxy.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
