"""Speak to a Redis server: commands, and its dump as a replica receives it.

Its own forty lines of RESP, because half of it (PSYNC, a dump in the middle of the connection) is what client
libraries do not do, and because a backup wants no retries that it does not know of.
Protocols: RESP2, and the replica's side of Redis replication.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from backupd.drivers.redis_stream import Answer, Moment
from backupd.errors import BackupdError, UsageError

Reply: TypeAlias = "int | bytes | list[Reply] | None"

TIMEOUT = 20.0
"""Seconds without a sign of life. While a dump is being made, Redis sends a newline every second."""
_CHUNK = 1 << 18


class RedisError(BackupdError):
    """The server refused, or could not be reached."""

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        """First word of the server's error, such as NOPERM; empty where it did not answer."""


_HINTS = {
    "NOAUTH": "the server wants a password: give password_file (and username, for an ACL user)",
    "WRONGPASS": "the username or the password is wrong",
    "NOPERM": "the user needs +ping +time +info +config|get, and +psync +replconf (over the wire) or +bgsave "
    '+lastsave (from a file), and +multi +exec for mode = "pitr"',
    "LOADING": "the server is still loading its data; try again when it has",
    "MISCONF": "the server cannot save to its disk; look at its log",
    "NOMASTERLINK": "this replica has lost its master; back up the master, or mend the link",
}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a server listens, and who asks."""

    host: str = "127.0.0.1"
    port: int = 6379
    unix: str = ""
    tls: bool = False
    ca_file: str = ""
    username: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"unix://{self.unix}" if self.unix else f"{self.host}:{self.port}"

    @classmethod
    def of_url(cls, url: str, *, username: str = "", password: str = "") -> RedisAddress:
        """`redis://host:port`, `rediss://` for TLS (`?ssl_ca_certs=FILE`), `unix:///path`; or UsageError."""
        try:
            parts = urlsplit(url)
            port = parts.port or 6379
        except ValueError as error:
            raise UsageError("the Redis url has no valid port", hint="write redis://host:6379") from error
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise UsageError(
                f"{parts.scheme}:// is no Redis server", hint="write redis:// rediss:// or unix://"
            )
        username = username or unquote(parts.username or "")
        password = password or unquote(parts.password or "")
        if parts.scheme == "unix":
            return cls(unix=unquote(parts.path), username=username, password=password)
        ca = parse_qs(parts.query).get("ssl_ca_certs", [""])[0]
        host = parts.hostname or "127.0.0.1"
        return cls(host, port, "", parts.scheme == "rediss", ca, username, password)


class Connection:
    """One connection; not for several threads. Every method raises RedisError."""

    def __init__(self, address: RedisAddress, *, timeout: float = TIMEOUT) -> None:
        """Connect and give the password, where there is one."""
        self.address = address
        self._buffer = bytearray()
        self._room = memoryview(bytearray(_CHUNK))
        self._timeout = timeout
        self._socket = self._connect(timeout)
        try:
            if address.password:
                user = [address.username] if address.username else []
                self.call("AUTH", *user, address.password)
        except BaseException:
            self.close()
            raise

    def _connect(self, timeout: float) -> socket.socket:
        at = self.address
        try:
            if at.unix:
                plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                plain.settimeout(timeout)
                plain.connect(at.unix)
                return plain
            plain = socket.create_connection((at.host, at.port), timeout=timeout)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not at.tls:
                return plain
            context = ssl.create_default_context(cafile=at.ca_file or None)
            return context.wrap_socket(plain, server_hostname=at.host)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RedisError(
                f"no Redis server answers at {at}: {reason}",
                hint="is it running, and reachable from here? check url or container",
            ) from error

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closing twice is fine."""
        with contextlib.suppress(OSError):
            self._socket.close()

    # --- RESP

    def call(self, *words: str | bytes) -> Reply:
        """One command and its answer. A refusal raises RedisError with the server's own words."""
        self.send(*words)
        return self._reply(words[0] if isinstance(words[0], str) else "")

    def text(self, *words: str | bytes) -> str:
        """As `call`, for commands that answer with one string."""
        reply = self.call(*words)
        return reply.decode(errors="replace") if isinstance(reply, bytes) else ""

    def pairs(self, *words: str | bytes) -> dict[str, str]:
        """As `call`, for commands that answer with names and values in turn, such as CONFIG GET."""
        reply = self.call(*words)
        flat = [v.decode(errors="replace") if isinstance(v, bytes) else "" for v in _items(reply)]
        return dict(zip(flat[::2], flat[1::2], strict=False))

    def send(self, *words: str | bytes) -> None:
        """A command whose answer is read later, or never comes."""
        self._put(_coded(words))

    def _put(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError | None = None) -> RedisError:
        reason = "did not answer in time" if isinstance(error, TimeoutError) else "closed the connection"
        return RedisError(
            f"the Redis server at {self.address} {reason}",
            hint="its log says why; it may be out of memory, or have been restarted",
        )

    def _fill(self) -> None:
        try:
            self._buffer += self._receive()
        except OSError as error:
            raise self._lost(error) from error

    def _receive(self) -> memoryview:
        """What came, good until the next call; OSError passes. Not recv(): that maps new memory for each chunk, and
        leaves a page or more of it mapped for a small one."""
        size = self._socket.recv_into(self._room)
        if not size:
            raise self._lost()
        return self._room[:size]

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            self._fill()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line.lstrip(b"\n")  # newlines before an answer are signs of life

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _reply(self, command: str = "") -> Reply:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            raise self._refused(command, rest.decode(errors="replace"))
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._exactly(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self._reply(command) for _ in range(int(rest))]
        raise RedisError(
            f"{self.address} does not speak the Redis protocol",
            hint="is this the right port? is it TLS only?",
        )

    def _refused(self, command: str, text: str) -> RedisError:
        code = text.partition(" ")[0].lstrip("-")
        return RedisError(
            f"the Redis server at {self.address} refuses {command or 'a command'}: {text}",
            hint=_HINTS.get("NOPERM" if " NOPERM " in text else code, ""),
            code=code,
        )

    # --- what everybody asks

    def info(self, section: str) -> dict[str, str]:
        """One section of INFO."""
        return _lines(self.text("INFO", section))

    def time(self) -> datetime:
        """The server's clock: everything it acknowledged before this call has happened before it."""
        reply = _items(self.call("TIME"))
        seconds, micros = (int(v) for v in reply if isinstance(v, bytes))
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)

    def config(self, *names: str) -> dict[str, str]:
        """Settings by name; those that the user may not see, or that do not exist, are not there."""
        found: dict[str, str] = {}
        for name in names:
            try:
                found.update(self.pairs("CONFIG", "GET", name))
            except RedisError as error:
                if not error.code:
                    raise
        return found

    def moment(self) -> Moment:
        """Its clock and its place in its history, nothing between them."""
        words = (("MULTI",), ("TIME",), ("INFO", "replication"), ("EXEC",))
        self._put(b"".join(map(_coded, words)))
        for word, *_ in words[:3]:
            self._reply(word)
        match self._reply("EXEC"):
            case [[bytes(seconds), bytes(micros)], bytes(info)]:
                said = _lines(info.decode(errors="replace"))
            case _:
                raise self._lost()
        at = datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(micros))
        current = said.get("role") != "slave" or said.get("master_link_status") == "up"
        return Moment(at, said.get("master_replid", ""), int(said.get("master_repl_offset", "0")), current)

    # --- its history, as a replica receives it

    def follow(self, epoch: str, position: int) -> Answer:
        """Ask for the stream from a position of its history on. Where the answer does not continue it, close the
        connection: the server was about to send a dump.

        It is not told any port: nobody connects to us, and nothing that promotes replicas can choose us.
        """
        self.call("REPLCONF", "capa", "eof", "capa", "psync2")
        self.send("PSYNC", epoch, str(position + 1))
        return self._answer()

    def _answer(self) -> Answer:
        line = self._line().decode(errors="replace")
        if line.startswith("-"):
            raise self._refused("PSYNC", line[1:])
        answer = Answer.of_line(line)
        if answer is None:
            raise RedisError(
                f"{self.address} answered PSYNC with {line[:60]!r}", hint="it is no server that has replicas"
            )
        return answer

    def stream(self, seconds: float) -> bytes:
        """What came of the stream, at the latest after some seconds; empty where nothing did."""
        if not self._buffer:
            self._socket.settimeout(seconds)
            try:
                return bytes(self._receive())
            except TimeoutError:
                return b""
            except OSError as error:
                raise self._lost(error) from error
            finally:
                self._socket.settimeout(self._timeout)
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    # --- the dump, as a replica receives it

    def dump(self) -> tuple[Answer, Iterator[bytes]]:
        """The whole dataset as an RDB, and of which place in the server's history it is. The server makes it when
        asked (after `repl-diskless-sync-delay`).

        Raises RedisError where the server refuses, or the connection ends before the dump does. Use the
        connection for nothing else, and close it at the end: nothing of a replica stays.
        """
        # rdb-only (Redis 7): the server keeps no stream of changes for us. version (Valkey 9): for a replica of
        # unknown version it would write an older format, and fail half-way where the data need the newer one.
        about = self.info("server")
        version = about.get("valkey_version") or about.get("redis_version", "")
        for option in (("capa", "eof"), ("rdb-only", "1"), ("version", version)):
            try:
                self.call("REPLCONF", *option)
            except RedisError as error:
                if error.code != "ERR":
                    raise
        self.send("PSYNC", "?", "-1")
        return self._answer(), self._payload()

    def _payload(self) -> Iterator[bytes]:
        head = self._line()
        if head.startswith(b"-"):
            raise self._refused("PSYNC", head[1:].decode(errors="replace"))
        if head.startswith(b"$EOF:"):
            yield from self._until(head[5:])
        elif head.startswith(b"$") and head[1:].isdigit():
            yield from self._counted(int(head[1:]))
        else:
            raise RedisError(
                f"{self.address} sent {head[:60]!r} in place of a dump", hint="use BGSAVE and a file"
            )

    def _counted(self, left: int) -> Iterator[bytes]:
        while left:
            if not self._buffer:
                self._fill()
            piece = bytes(self._buffer[:left])
            del self._buffer[: len(piece)]
            left -= len(piece)
            yield piece

    def _until(self, mark: bytes) -> Iterator[bytes]:
        """Up to a mark of 40 random bytes; nothing follows it before a replica's first ACK, never sent."""
        while True:
            if self._buffer.endswith(mark):
                yield bytes(self._buffer[: -len(mark)])
                self._buffer.clear()
                return
            sure = len(self._buffer) - len(mark)
            if sure > _CHUNK // 2:
                yield bytes(self._buffer[:sure])
                del self._buffer[:sure]
            self._fill()


def _coded(words: Sequence[str | bytes]) -> bytes:
    coded = [w if isinstance(w, bytes) else w.encode(errors="surrogateescape") for w in words]
    return b"*%d\r\n" % len(coded) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in coded)


def _lines(info: str) -> dict[str, str]:
    lines = info.splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def _items(reply: Reply) -> list[Reply]:
    return reply if isinstance(reply, list) else []
