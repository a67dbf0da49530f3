"""A master made of a stored dump and a stored stream: one Redis server follows it, and is then what its original was.

The server is told `REPLICAOF`, receives the dump and the commands behind it as from a real master, and says how far it
came. No command is interpreted here, so transactions, scripts, functions, stream groups and absolute expiry times come
out as they were; and a replica expires nothing by itself, so that keys whose time has passed are there too.

Protocol: the master's side of Redis replication, as in Redis' own replication.c: handshake (PING, AUTH, REPLCONF),
PSYNC answered with +FULLRESYNC, the dump with its length or between two marks, then the bytes of the stream.
Newlines keep the link up before the dump and behind the stream. Within the stream there are none: they would count.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from backupd.errors import RestoreFailed

SILENCE = 300.0
"""Seconds without a byte taken or sent by the server. While it loads a dump it sends a newline every second, and behind
it an ACK; a single long command (a script, FLUSHALL of a large database) is silent."""
_GREETS_WITHIN = 5.0
"""Seconds of silence in the handshake: a stranger must not keep the server out for longer."""
_COMES_WITHIN = 30.0
"""Seconds: a server that was told of its master tries every second."""
_TRIES = 3
"""Times that the dump is sent: a server that drops it as often will not take it."""
_NAP = 0.5
_LIFE = 10.0  # seconds between two newlines
_CHUNK = 1 << 18
_LONGEST = 1 << 16  # bytes of a command in the handshake


@dataclass(frozen=True, slots=True)
class Feed:
    """What is handed out. `dump` and `stream` begin anew with each call, as a link may break."""

    dump: Callable[[], Iterator[bytes]]
    size: int | None
    """Of the dump; None where it is not known: then it is sent between two marks."""
    stream: Callable[[], Iterator[bytes]] = lambda: iter(())
    offset: int = 0
    """The place in the history that the dump is of."""
    replid: str = field(default_factory=lambda: secrets.token_hex(20))
    """The history's name. A new one, so that neither the server nor a replica of it takes its own past for a part of
    this one."""


@dataclass(slots=True)
class Progress:
    """How far the server came, at any time."""

    connected: int = 0
    """Times that a server with the right password asked for the dump."""
    refused: str = ""
    """Of the last one that was not let in: who, and why."""
    dump: int = 0
    """Bytes of the dump that were sent in the last attempt."""
    dump_sent: bool = False
    """The last bytes of the dump were sent, or were about to be: the server may throw away what it holds."""
    sent: int = 0
    """The place up to which the stream was sent."""
    end: int | None = None
    """The place where the stream ends, once it was sent."""
    acknowledged: int | None = None
    """The place up to which the server says that it is; None before it has loaded the dump."""
    lost: str = ""
    """Why the last link ended."""
    strayed: bool = False
    """The server could not execute all of the stream."""


class Lost(Exception):
    """The link to the server broke; it may come again."""


class Master:
    """Listens for one server, and makes it what `feed` says. A context: listens inside."""

    def __init__(self, feed: Feed, *, host: str = "", port: int = 0, user: str = "", password: str) -> None:
        """`host` empty: all addresses of this machine; `port` 0: a free one. Raises RestoreFailed."""
        self.feed = feed
        self.progress = Progress()
        self._user, self._password = user, password
        try:
            self._listener = _listener(host, port)
        except OSError as error:
            raise RestoreFailed(
                f"cannot listen at {host or 'any address'}:{port or 'any port'}: {error.strerror or error}",
                hint="name another address and port of this machine",
            ) from None

    def __enter__(self) -> Master:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @contextlib.contextmanager
    def led(self, check: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Serve the server until it acknowledges the end of the stream. Yields that place, with the link still up:
        inside, take the server from us (`REPLICAOF NO ONE`). `check` is called often, and may raise.

        Raises RestoreFailed where no server comes, or where it drops the link too often; `progress` says how far it
        came.
        """
        for _ in range(_TRIES):
            with self._admitted(check) as link:
                try:
                    end = self._hand_over(link)
                except Lost as lost:
                    self.progress.lost = str(lost)
                    continue
                yield end
                return
        raise RestoreFailed(
            f"the server dropped the link {_TRIES} times: {self.progress.lost}",
            hint="its log says why: no room on its disk or in its memory, or a dump that a newer version wrote?",
        )

    # --- who may come

    @contextlib.contextmanager
    def _admitted(self, check: Callable[[], None]) -> Iterator[_Link]:
        """The server, when it has shown the password and asked for its dump."""
        deadline = time.monotonic() + _COMES_WITHIN
        while time.monotonic() < deadline:
            check()
            if not select.select([self._listener], [], [], _NAP)[0]:
                continue
            there, address = self._listener.accept()
            with contextlib.closing(_Link(there, check)) as link:
                refused = self._greet(link)
                if not refused:
                    self.progress.connected += 1
                    yield link
                    return
                self.progress.refused = f"{address[0]} {refused}"
        told = f"; {self.progress.refused}" if self.progress.refused else ""
        raise RestoreFailed(
            f"the server did not come to port {self.port} of this machine within {_COMES_WITHIN:.0f} s{told}",
            hint="is there a firewall between them? name an address of this machine that the server reaches: --listen",
        )

    def _greet(self, link: _Link) -> str:
        """The handshake, up to PSYNC; why it failed, where it did. Who asks for anything without the password is sent
        away."""
        known = False
        link.within = _GREETS_WITHIN
        try:
            while True:
                words = link.command()
                match words[0].upper():
                    case b"PING":
                        link.put(b"+PONG\r\n")
                    case b"AUTH" if not self._right(words[1:]):
                        link.put(b"-WRONGPASS this master is for one server alone\r\n")
                        return "gave another password than the one made for this restore"
                    case b"AUTH":
                        known = True
                        link.put(b"+OK\r\n")
                    case _ if not known:
                        link.put(b"-NOAUTH Authentication required.\r\n")
                        return "gave no password"
                    case b"PSYNC":
                        return ""
                    case b"REPLCONF":
                        link.put(b"+OK\r\n")
                    case _:
                        link.put(b"-ERR unknown command\r\n")
        except Lost as lost:
            return f"went away: {lost}"

    def _right(self, words: list[bytes]) -> bool:
        expected = [self._user, self._password] if self._user else [self._password]
        return len(words) == len(expected) and all(
            hmac.compare_digest(word, right.encode()) for word, right in zip(words, expected, strict=True)
        )

    # --- what it gets

    def _hand_over(self, link: _Link) -> int:
        feed, progress = self.feed, self.progress
        progress.dump, progress.sent, progress.acknowledged = 0, feed.offset, None
        link.within, link.heard = SILENCE, self._heard
        link.put(b"+FULLRESYNC %s %d\r\n" % (feed.replid.encode(), feed.offset))
        self._put_dump(link)
        for chunk in feed.stream():
            link.put(chunk)
            progress.sent += len(chunk)
        progress.end = progress.sent
        while progress.acknowledged is None or progress.acknowledged < progress.sent:
            link.wait()
        return progress.sent

    def _put_dump(self, link: _Link) -> None:
        """Its last piece is sent when all was read and found whole: a server that never has all of it throws nothing
        away."""
        feed, progress = self.feed, self.progress
        chunks = feed.dump()
        last = next(
            chunks, b""
        )  # what opens an archive may take a while: the server hears the length after that
        mark = secrets.token_hex(20).encode() if feed.size is None else b""
        link.put(b"$EOF:%s\r\n" % mark if feed.size is None else b"$%d\r\n" % feed.size)
        for chunk in chunks:
            link.put(last)
            progress.dump += len(last)
            last = chunk
        if feed.size not in (None, progress.dump + len(last)):
            raise RestoreFailed(
                f"the archived dump has {progress.dump + len(last)} bytes instead of {feed.size}",
                hint="run backupd verify",
            )
        progress.dump_sent = True
        link.put(last + mark)
        progress.dump += len(last)

    def _heard(self, words: list[bytes]) -> None:
        if (
            len(words) >= 3
            and words[0].upper() == b"REPLCONF"
            and words[1].upper() == b"ACK"
            and words[2].isdigit()
        ):
            self.progress.acknowledged = int(words[2])


def _listener(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


class _Link:
    """A connection to a server. What it says is read at all times, so that neither side waits for the other."""

    def __init__(self, there: socket.socket, check: Callable[[], None]) -> None:
        there.setblocking(False)
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._check = there, check
        self._buffer = bytearray()
        self._life = self._newline = time.monotonic()
        self.within = SILENCE
        """Seconds of silence after which it is lost."""
        self.heard: Callable[[list[bytes]], None] | None = None
        """Told of each command, once it is set."""

    def close(self) -> None:
        self._socket.close()

    def command(self) -> list[bytes]:
        """The next command. Raises Lost."""
        while (words := take_command(self._buffer)) is None:
            self._turn(sending=False)
        return words

    def put(self, data: bytes) -> None:
        """Send it all. Raises Lost."""
        view = memoryview(data)
        while view:
            if not self._turn(sending=True):
                continue
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Lost(error.strerror or str(error)) from None
            self._life = time.monotonic()

    def wait(self) -> None:
        """Until it says something, or for a moment; a newline tells it now and then that we are there."""
        self._turn(sending=False)
        if time.monotonic() - self._newline > _LIFE:
            self._newline = time.monotonic()
            with contextlib.suppress(OSError):  # a full buffer, or an end that the next reading finds
                self._socket.send(b"\n")

    def _turn(self, *, sending: bool) -> bool:
        """Wait for the socket; read what is there; whether it can be written to. Raises Lost."""
        self._check()
        readable, writable, _ = select.select([self._socket], [self._socket] if sending else [], [], _NAP)
        if readable:
            self._read()
        elif not writable and time.monotonic() - self._life > self.within:
            raise Lost(f"not a sign of life for {self.within:.0f} s")
        return bool(writable)

    def _read(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        if not data:
            raise Lost("it closed the connection")
        self._life = time.monotonic()
        self._buffer += data
        if self.heard is None:
            if len(self._buffer) > _LONGEST:
                raise Lost("it sent no command of a replica")
            return
        while (words := take_command(self._buffer)) is not None:
            self.heard(words)


def take_command(buffer: bytearray) -> list[bytes] | None:
    """Take the first command off a buffer: an array of strings, or words of a line; None where it is not whole yet.
    Newlines before it are signs of life. Raises Lost for anything else."""
    blank = len(buffer) - len(buffer.lstrip(b"\r\n"))
    del buffer[:blank]
    end = buffer.find(b"\r\n")
    if end < 0:
        return None
    try:
        if buffer[0] != 0x2A:  # *
            words, at = bytes(buffer[:end]).split() or [b""], end + 2
        else:
            words, count, at = [], int(buffer[1:end]), end + 2
            for _ in range(count):
                end = buffer.find(b"\r\n", at)
                if end < 0:
                    return None
                size, at = int(buffer[at + 1 : end]), end + 2
                if len(buffer) < at + size + 2:
                    return None
                words.append(bytes(buffer[at : at + size]))
                at += size + 2
    except ValueError:
        raise Lost("it does not speak the Redis protocol") from None
    del buffer[:at]
    return words or [b""]
