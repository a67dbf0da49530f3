"""The engine's raw connections: what a program in a container reads and writes, both ways at once.

An exec or attach request turns its HTTP connection into a plain byte stream. The engine's side of it comes in
frames of an 8-byte header (stream number, three zero bytes, length as a big-endian 32-bit number) and that
many bytes; ours is stdin as it is. (Docker Engine API, "Attach to a container", stream format.)
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from backupd.errors import ContainerError
from backupd.sandbox.said import Said

STDIN, STDOUT, STDERR, ENGINE = 0, 1, 2, 3
HEADER = 8
RECEIVE = 1 << 18  # a Unix socket hands out some 200 KiB at a time; frames are 32 KiB


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
        # docker-py would hand out the naked socket, and with it lose what its buffered reader has already
        # taken in behind the HTTP header: the first bytes, where the program is quick and the reader slow.
        self._response = response
        self._reader: Any = getattr(response.raw._fp, "fp", None)
        naked = getattr(getattr(self._reader, "raw", None), "_sock", None)
        if naked is None or not hasattr(self._reader, "readinto1"):
            response.close()
            raise ContainerError(
                "this way to the container engine carries no streams",
                hint="set DOCKER_HOST to unix:///var/run/docker.sock or tcp://host:2376",
            )
        self._socket: socket.socket = naked
        self._socket.settimeout(None)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._said = Said()
        self._feeder: threading.Thread | None = None
        self.stdin_error: BaseException | None = None
        """What the iterable given to `feed` raised: the program has not seen all of its input."""

    @property
    def stderr(self) -> str:
        """What the program wrote to stderr: both ends of it."""
        return self._said.text

    def feed(self, chunks: Iterable[bytes]) -> None:
        """Send `chunks` to the program's stdin from a thread of its own, then close stdin."""
        self._feeder = threading.Thread(target=self._send, args=(chunks,), name="stdin", daemon=True)
        self._feeder.start()

    def _send(self, chunks: Iterable[bytes]) -> None:
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
            # Reading only: the program must not see an end of stdin and take half of its input for the whole.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RD)
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

    def _receive(self, buffer: memoryview, deadline: float | None) -> int:
        if deadline is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
        try:
            return int(self._reader.readinto1(buffer))
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

    def drain(self, seconds: float) -> None:
        """Throw away what still comes, until the program ends its output or `seconds` are over."""
        deadline, buffer = time.monotonic() + seconds, memoryview(bytearray(RECEIVE))
        with contextlib.suppress(ContainerError, TimeoutError):
            while self._receive(buffer, deadline):
                pass

    def close(self) -> None:
        """Give the connection up; never raises."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with contextlib.suppress(Exception):
            self._response.close()
        with contextlib.suppress(OSError):
            self._socket.close()
        if self._feeder is not None and self._feeder is not threading.current_thread():
            self._feeder.join(timeout=0.5)  # it may be waiting for its own source; it is a daemon
