"""The engine's raw connections: what a program in a container reads and writes, both ways at once.

An exec or attach request turns its HTTP connection into a plain byte stream. The engine's side of it comes in
frames of an 8-byte header (stream number, three zero bytes, length as a big-endian 32-bit number) and that
many bytes; ours is stdin as it is. (Docker Engine API, "Attach to a container", stream format.)
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from backupd.errors import ContainerError
from backupd.model import Bytes
from backupd.sandbox.said import Said

STDIN, STDOUT, STDERR, ENGINE = 0, 1, 2, 3
HEADER = 8
BLOCK = 1 << 17
"""Bytes of a body's chunk: urllib3 copies each, and a large one into fresh memory."""
RECEIVE = 1 << 18  # a Unix socket hands out some 200 KiB at a time; frames are 32 KiB


def in_blocks(chunks: Iterable[Bytes]) -> Iterator[Bytes]:
    """The same bytes, at most BLOCK at a time."""
    for chunk in chunks:
        for at in range(0, len(chunk), BLOCK):
            yield memoryview(chunk)[at : at + BLOCK]


class Demultiplexer:
    """Splits the engine's frames, however the bytes arrive. Views handed out live until the next `feed`."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._kind = 0
        self._left = 0

    @property
    def between_frames(self) -> bool:
        """False while a frame is incomplete: an end here is a broken connection, not a program's end."""
        return not self._left and not self._header

    def feed(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The pieces in `data`, with the stream each belongs to. Raises ContainerError for no frame."""
        while data:
            if self._left:
                piece = data[: self._left]
                self._left -= len(piece)
                data = data[len(piece) :]
                yield self._kind, piece
                continue
            wanted = HEADER - len(self._header)
            self._header += data[:wanted]
            data = data[wanted:]
            if len(self._header) == HEADER:
                self._kind = self._header[0]
                self._left = int.from_bytes(self._header[4:], "big")
                if self._kind > ENGINE or any(self._header[1:4]):
                    raise ContainerError("the container engine sent something that is no stream frame")
                self._header.clear()


class Hijacked:
    """One program's stdin, stdout and stderr over a connection that the engine has handed over."""

    def __init__(self, response: Any) -> None:
        self._response = response
        reader = getattr(response.raw._fp, "fp", None)
        naked = getattr(getattr(reader, "raw", None), "_sock", None)
        if reader is None or naked is None:
            response.close()
            raise ContainerError(
                "this way to the container engine carries no streams",
                hint="set DOCKER_HOST to unix:///var/run/docker.sock or tcp://host:2376",
            )
        self._socket: socket.socket = naked
        # docker-py would hand out the naked socket, and with it lose what the reader of the HTTP header has
        # already taken in behind it: the first bytes, where the program is quick and this process slow.
        self._ahead = _taken_in(reader, naked)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._wake, self._waker = socket.socketpair()
        self._said = Said()
        self._feeder: threading.Thread | None = None
        self.stdin_error: BaseException | None = None
        """What the iterable given to `feed` raised: the program has not seen all of its input."""

    @property
    def stderr(self) -> str:
        """What the program wrote to stderr: both ends of it."""
        return self._said.text

    def feed(self, chunks: Iterable[Bytes]) -> None:
        """Send `chunks` to the program's stdin from a thread of its own, then close stdin."""
        self._feeder = threading.Thread(target=self._send, args=(chunks,), name="stdin", daemon=True)
        self._feeder.start()

    def _send(self, chunks: Iterable[Bytes]) -> None:
        try:
            for chunk in chunks:
                try:
                    self._socket.sendall(chunk)
                except OSError:
                    return  # the program stopped reading: its exit status says whether that is right
            # not SSLSocket.shutdown: that one gives up decrypting what still comes back
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_WR)
        except BaseException as error:  # noqa: BLE001  handed to the thread that reads
            self.stdin_error = error
            # Only wake the reader. Whatever closes a side of the connection makes the engine close stdin, and
            # the program would take half of its input for the whole.
            with contextlib.suppress(OSError):
                self._waker.sendall(b"!")
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def output(self, *, deadline: float | None = None) -> Iterator[bytes]:
        """The program's stdout, as it comes.

        Raises ContainerError when the connection breaks, TimeoutError at `deadline` (of `time.monotonic`).
        """
        frames = Demultiplexer()
        buffer = memoryview(bytearray(RECEIVE))
        while size := self._receive(buffer, deadline):
            pieces = []
            for kind, piece in frames.feed(buffer[:size]):
                if kind == STDOUT:
                    pieces.append(piece)
                else:
                    self._said.add(piece)
            if pieces:
                yield b"".join(pieces)
        if self.stdin_error is None and not frames.between_frames:
            raise ContainerError("the connection to the container engine broke in the middle of a stream")

    def _receive(self, buffer: memoryview, deadline: float | None, *, wake: bool = True) -> int:
        """Some bytes; 0 at the end, or when stdin broke and `wake` is true."""
        if self._ahead:
            size = min(len(self._ahead), len(buffer))
            buffer[:size], self._ahead = self._ahead[:size], self._ahead[size:]
            return size
        try:
            if not self._has_bytes(deadline, wake=wake):
                return 0
            return self._socket.recv_into(buffer)
        except TimeoutError:
            raise
        except ConnectionResetError:
            # A program that ended without reading all of its stdin. Over a Unix socket everything it wrote
            # was read before; over TCP a reset may have swallowed some of it.
            if self._socket.family == socket.AF_UNIX:
                return 0
            raise ContainerError("the connection to the container engine was reset") from None
        except OSError as error:
            raise ContainerError(f"the connection to the container engine broke: {error}") from None

    def _has_bytes(self, deadline: float | None, *, wake: bool) -> bool:
        """Wait for the engine; False when stdin broke first. Raises TimeoutError."""
        pending = getattr(self._socket, "pending", None)
        if pending is not None and pending():
            return True  # decrypted already: the socket itself will not say so
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if wake:
            poll.register(self._wake, select.POLLIN)
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = [descriptor for descriptor, _ in poll.poll(remaining)]
        if not ready:
            raise TimeoutError
        return self._wake.fileno() not in ready

    def drain(self, seconds: float) -> None:
        """Throw away what still comes, until the program ends its output or `seconds` are over."""
        deadline, buffer = time.monotonic() + seconds, memoryview(bytearray(RECEIVE))
        with contextlib.suppress(ContainerError, TimeoutError):
            while self._receive(buffer, deadline, wake=False):
                pass

    def close(self) -> None:
        """Give the connection up; never raises."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with contextlib.suppress(Exception):
            self._response.close()
        with contextlib.suppress(OSError):
            self._socket.close()
        self._wake.close()
        self._waker.close()
        if self._feeder is not None and self._feeder is not threading.current_thread():
            self._feeder.join(timeout=0.5)  # it may be waiting for its own source; it is a daemon


def _taken_in(reader: Any, naked: socket.socket) -> bytes:
    """What a buffered reader holds, without waiting for more. The socket blocks afterwards."""
    naked.setblocking(False)
    try:
        return bytes(reader.read1(1 << 20) or b"")
    except (ssl.SSLWantReadError, BlockingIOError):
        return b""
    finally:
        naked.settimeout(None)
