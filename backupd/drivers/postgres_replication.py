"""PostgreSQL's streaming replication protocol, as far as a backup needs it: over the network, without any program.

Source: the PostgreSQL manual, "Streaming Replication Protocol". A walsender takes simple queries only, and its
COPY messages are read without blocking: libpq would hold Python's lock while it waits.
"""

from __future__ import annotations

import contextlib
import select
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backupd.drivers._napping import let_more_come
from backupd.errors import CommandFailed, UsageError

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.pq.abc import PGresult

MANIFEST = "backup_manifest"
BASE = ""
"""The part of a base backup that is the data directory itself; others are named by their tablespace's OID."""

_EPOCH = 946_684_800  # PostgreSQL counts microseconds from 2000-01-01
_UPLOAD = 1 << 16
_REMOVED = "58P01"  # undefined_file: "requested WAL segment ... has already been removed"
_QUIET = {
    "connect_timeout": "10",
    "application_name": "backupd",
    # A server that vanished without a word: libpq would wait two hours for it.
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


class ServerRefused(CommandFailed):
    """The server did not do what it was asked for; `stderr` holds its words."""

    def __init__(self, message: str, *, hint: str = "", sqlstate: str = "") -> None:
        super().__init__(message, hint=hint, stderr=f"ERROR: {message}")
        self.sqlstate = sqlstate

    @property
    def log_is_gone(self) -> bool:
        """The server does not have the WAL any more that was asked for, or the slot was given up."""
        text = self.message
        return (self.sqlstate == _REMOVED and "already been removed" in text) or "invalidated" in text


def position_of(text: str) -> int:
    """A log sequence number as the server writes it, `16/B374D848`. Raises ValueError."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def position_text(position: int) -> str:
    """As the server writes it."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


# --- where -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is reached, and as whom: libpq's parameters."""

    parameters: Mapping[str, str] = field(repr=False)

    @property
    def where(self) -> str:
        """For people; never holds a secret."""
        host = self.parameters.get("host") or self.parameters.get("hostaddr") or "localhost"
        port = self.parameters.get("port")
        return f"{host}:{port}" if port else host

    def connect(self) -> Connection[tuple[Any, ...]]:
        """A connection for SQL, to the first database that lets us in. Raises ServerRefused."""
        failure: ServerRefused | None = None
        given = self.parameters.get("dbname")
        for database in dict.fromkeys([*([given] if given else []), "postgres", "template1"]):
            try:
                return _connect({**_QUIET, **self.parameters, "dbname": database})
            except ServerRefused as error:
                failure = failure or error
                if f'database "{database}" does not exist' not in error.message:
                    break
        raise failure or ServerRefused("no database to connect to")

    def replicate(self) -> Replication:
        """A connection that speaks the replication protocol. Raises ServerRefused."""
        parameters = {key: value for key, value in self.parameters.items() if key != "dbname"}
        return Replication(_connect({**_QUIET, **parameters, "replication": "true"}))


def server_from_url(url: str, *, user: str | None = None, password: str | None = None) -> Server:
    """libpq reads the URL itself, with all it may say (sslmode, several hosts). Raises UsageError."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        given = {key: str(value) for key, value in conninfo_to_dict(url).items() if value is not None}
    except psycopg.Error as error:
        raise UsageError(
            "the url of a PostgreSQL source cannot be read", hint="postgresql://user@host:port/database"
        ) from error
    own = {"user": user or "", "password": password or ""}
    return Server({**given, **{key: value for key, value in own.items() if value}})


def _connect(parameters: Mapping[str, str]) -> Connection[tuple[Any, ...]]:
    import psycopg
    from psycopg.conninfo import make_conninfo

    try:
        return psycopg.connect(make_conninfo("", **parameters), autocommit=True)
    except psycopg.Error as error:
        raise ServerRefused(_connection_error(str(error))) from error


def _connection_error(text: str) -> str:
    """What the server said, else why it could not be reached; without libpq's list of what it tried."""
    lines = [line.strip(" -\t") for line in text.splitlines() if line.strip()] or ["no reason given"]
    said = next((line for line in reversed(lines) if "FATAL:" in line), "")
    return said.rpartition("FATAL:")[2].strip() or lines[0].removeprefix("connection failed: ")


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """A connection that breaks is the server's refusal too."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise ServerRefused(_connection_error(str(error)), sqlstate=error.sqlstate or "") from error


# --- one connection ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class System:
    """Which cluster this is, and how far it got."""

    identifier: str
    timeline: int
    position: int

    @property
    def epoch(self) -> str:
        """What a position belongs to."""
        return f"{self.identifier}-{self.timeline}"


class Replication:
    """One connection to a walsender. Not for use by several threads."""

    def __init__(self, connection: Connection[tuple[Any, ...]]) -> None:
        self._connection = connection
        self._pg = connection.pgconn
        self._poll = select.poll()
        self._poll.register(self._pg.socket, select.POLLIN)
        self.warnings: list[str] = []
        """What the server warned of: a page with a wrong checksum, by file and block."""
        connection.add_notice_handler(lambda told: self.warnings.append(told.message_primary or ""))
        self.received = 0
        """The end of the WAL received."""
        self.tail: list[list[str]] = []
        """The rows that came last where a COPY could have come."""
        self._flushed = 0
        self._streaming = False
        self._came = 0  # bytes of the log since the last look at the socket

    def __enter__(self) -> Replication:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The server ends what it was sending, and drops temporary slots."""
        with contextlib.suppress(Exception):
            self._connection.close()

    @property
    def version(self) -> int:
        """160002 for 16.2."""
        return self._pg.server_version

    # --- questions

    def query(self, command: str) -> list[list[str]]:
        """The rows that answer one command. Raises ServerRefused."""
        self._send(command)
        rows: list[list[str]] = []
        while (result := self._result()) is not None:
            rows += _rows(result)
        return rows

    def identify(self) -> System:
        identifier, timeline, position, *_ = self.query("IDENTIFY_SYSTEM")[0]
        return System(identifier, int(timeline), position_of(position))

    def create_slot(self, name: str, *, temporary: bool = False) -> None:
        """A physical slot that holds WAL from the last checkpoint on."""
        kind = "TEMPORARY PHYSICAL" if temporary else "PHYSICAL"
        self.query(f"CREATE_REPLICATION_SLOT {name} {kind} RESERVE_WAL")

    def drop_slot(self, name: str) -> None:
        self.query(f"DROP_REPLICATION_SLOT {name}")

    def timeline_history(self, timeline: int) -> str:
        """The content of its history file: where it and those before it began. Empty for the first."""
        return self.query(f"TIMELINE_HISTORY {timeline}")[0][1] if timeline > 1 else ""

    # --- a base backup

    def upload_manifest(self, manifest: bytes) -> None:
        """Of the base backup that the next one, taken as `incremental`, continues. Raises ServerRefused."""
        from psycopg.pq import ExecStatus

        self._send("UPLOAD_MANIFEST")
        result = self._result()
        if result is None or result.status != ExecStatus.COPY_IN:
            raise ServerRefused("the server takes no manifest")
        for at in range(0, len(manifest), _UPLOAD):
            self._pg.put_copy_data(manifest[at : at + _UPLOAD])
            self._flush()
        self._pg.put_copy_end()
        self._flush()
        self.query_rest()

    def base_backup(self, command: str) -> BaseBackup:
        """Begin one; returns when the server's checkpoint is done. Raises ServerRefused."""
        self._send(command)
        heads = [self._result(), self._result()]
        if heads[0] is None or heads[1] is None:
            raise ServerRefused("the server did not begin a base backup")
        (start, timeline), *_ = _rows(heads[0])
        spaces = [(oid or BASE, path) for oid, path, *_ in _rows(heads[1])]
        return BaseBackup(self, position_of(start), int(timeline), spaces)

    def copy_out(self) -> Iterator[memoryview] | None:
        """The messages of the next COPY; None when rows came instead, which `tail` then holds."""
        from psycopg.pq import ExecStatus

        self.tail = []
        while (result := self._result()) is not None:
            if result.status == ExecStatus.COPY_OUT:
                return self._copied()
            self.tail += _rows(result)
        return None

    def _copied(self) -> Iterator[memoryview]:
        while True:
            size, data = self._pg.get_copy_data(1)
            if size > 0:
                yield data
            elif size == 0:
                self._wait(None)
                self._pg.consume_input()
            else:
                return  # a failure shows in the next result

    # --- the log

    def start(self, slot: str, position: int, timeline: int) -> bool:
        """Stream WAL from exactly `position`; False where the timeline ended there. Raises ServerRefused."""
        from psycopg.pq import ExecStatus

        self.query_rest()  # of a stream that was left
        self._send(f"START_REPLICATION SLOT {slot} PHYSICAL {position_text(position)} TIMELINE {timeline}")
        result = self._result()
        self.received = position
        if result is not None and result.status == ExecStatus.COPY_BOTH:
            self._streaming = True
            return True
        self.tail = _rows(result) if result is not None else []
        return False

    def receive(self, timeout: float) -> memoryview | None:
        """The next bytes of the log; none when nothing came in time; None when the server ended the stream.

        Raises ServerRefused, also for bytes that do not follow on those before.
        """
        deadline = time.monotonic() + timeout
        while True:
            size, data = self._pg.get_copy_data(1)
            if size > 0:
                kind = bytes(data[:1])
                if kind == b"w":
                    (start,) = struct.unpack_from("!Q", data, 1)
                    if start != self.received:
                        raise ServerRefused(
                            f"the server sent the log from {position_text(start)}, not from "
                            f"{position_text(self.received)} on"
                        )
                    self.received += size - 25
                    self._came += size
                    return data[25:]
                if kind == b"k" and data[17]:
                    self.report(self._flushed)
                continue
            if size < 0:
                return None
            if (left := deadline - time.monotonic()) <= 0:
                return memoryview(b"")
            if self._wait(left):
                let_more_come(self._came)
                self._came = 0
                self._pg.consume_input()

    def leave(self) -> None:
        """Ask the server to end the stream: `receive` gives what is on its way, then None. Then it can be started
        again at `received`."""
        self._streaming = False
        self._pg.put_copy_end()
        self._flush()

    def report(self, flushed: int) -> None:
        """Tell what is durable here: the server may let go of everything before it. Outside a stream it is not told."""
        self._flushed = flushed
        if not self._streaming:
            return
        now = int((time.time() - _EPOCH) * 1e6)
        # nothing is applied: this is no standby that a commit could wait for with `remote_apply`
        self._pg.put_copy_data(b"r" + struct.pack("!QQQqB", self.received, flushed, 0, now, 0))
        self._flush()

    def next_timeline(self) -> tuple[int, int]:
        """After the server has ended the stream: the timeline that follows, and where it begins.

        Raises ServerRefused where none does: the server stops, or the log is gone.
        """
        if not self.tail:
            with contextlib.suppress(Exception):
                self.leave()
            while (result := self._result()) is not None:
                self.tail += _rows(result)
        if not self.tail:
            raise ServerRefused("the server ended the stream of its log: is it stopping?")
        (timeline, position), *_ = self.tail
        self.query_rest()
        return int(timeline), position_of(position)

    def query_rest(self) -> None:
        """Read the results of the last command to their end."""
        while self._result() is not None:
            pass

    # --- the wire

    def _send(self, command: str) -> None:
        self.tail = []
        self._pg.send_query(command.encode())
        self._flush()

    def _flush(self) -> None:
        while self._pg.flush():
            select.select([], [self._pg.socket], [], 1.0)

    def _wait(self, timeout: float | None) -> bool:
        return bool(self._poll.poll(None if timeout is None else max(timeout, 0) * 1000))

    def _result(self) -> PGresult | None:
        """The next result; None after the last. Raises ServerRefused for a failure."""
        from psycopg.pq import DiagnosticField, ExecStatus

        while self._pg.is_busy():
            self._wait(None)
            self._pg.consume_input()
        result = self._pg.get_result()
        if result is None or result.status not in (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE):
            return result
        said = result.error_field(DiagnosticField.MESSAGE_PRIMARY) or result.error_message
        state = result.error_field(DiagnosticField.SQLSTATE) or b""
        raise ServerRefused(_one_line(said), sqlstate=state.decode())


def _rows(result: PGresult) -> list[list[str]]:
    return [
        [(result.get_value(row, column) or b"").decode(errors="replace") for column in range(result.nfields)]
        for row in range(result.ntuples)
    ]


def _one_line(said: bytes) -> str:
    return " ".join(said.decode(errors="replace").split())


# --- a base backup at work -----------------------------------------------------------------------------------


def base_backup_command(
    version: int, *, label: str, verify: bool, max_rate: int = 0, incremental: bool = False
) -> str:
    """BASE_BACKUP as a server of this version reads it; `max_rate` in bytes a second, 0 is no limit.

    A server takes 32 kB/s to 1 GB/s; more than that is no limit either. Its manifest has CRC-32C, as pg_basebackup's:
    whatever comes is digested here, and SHA-256 would be half of the time of the one process that sends.
    """
    kilobytes = max(max_rate >> 10, 32)
    limit = [f"MAX_RATE {kilobytes}"] if max_rate > 0 and kilobytes <= 1 << 20 else []
    if version >= 150000:
        options = [
            f"LABEL '{label}'", "CHECKPOINT 'fast'", "WAIT false", "TABLESPACE_MAP true", "MANIFEST 'yes'",
            "MANIFEST_CHECKSUMS 'CRC32C'", f"VERIFY_CHECKSUMS {str(verify).lower()}",
            *limit, *(["INCREMENTAL"] if incremental else []),
        ]  # fmt: skip
        return f"BASE_BACKUP ({', '.join(options)})"
    options = [
        f"LABEL '{label}'", "FAST", "NOWAIT",
        *limit, "TABLESPACE_MAP",
        *([] if verify else ["NOVERIFY_CHECKSUMS"]), "MANIFEST 'yes'", "MANIFEST_CHECKSUMS 'CRC32C'",
    ]  # fmt: skip
    return f"BASE_BACKUP {' '.join(options)}"


class BaseBackup:
    """What the server sends of one base backup, in the framing of its version."""

    def __init__(
        self, connection: Replication, start: int, timeline: int, tablespaces: Sequence[tuple[str, str]]
    ) -> None:
        self._connection = connection
        self.start = start
        self.timeline = timeline
        self._parts = [oid for oid, _ in tablespaces]
        self.sent = 0
        """Bytes that came."""
        self.end: int | None = None
        """Where the log must be replayed up to, known when `messages` has ended well."""

    def messages(self) -> Iterator[tuple[str, memoryview]]:
        """(part, bytes of its tar); the part MANIFEST is no tar. Raises ServerRefused at its end where the
        server found something wrong."""
        for part, data in self._messages():
            self.sent += len(data)
            yield part, data

    def _messages(self) -> Iterator[tuple[str, memoryview]]:
        typed = self._connection.version >= 150000
        part = BASE
        for number in range(len(self._parts) + 1):
            copied = self._connection.copy_out()
            if copied is None:
                break
            if typed:
                yield from _typed_messages(copied)
                continue
            part = self._parts[number] if number < len(self._parts) else MANIFEST
            for data in copied:
                yield part, data
        rows = self._connection.tail or _rest(self._connection)
        if not rows:
            raise ServerRefused("the base backup ended early")
        self._connection.query_rest()
        self.end = position_of(rows[0][0])


def _rest(connection: Replication) -> Sequence[Sequence[str]]:
    if connection.copy_out() is not None:
        raise ServerRefused("the server sent more of a base backup than it had announced")
    return connection.tail


def _typed_messages(copied: Iterator[memoryview]) -> Iterator[tuple[str, memoryview]]:
    """From version 15 on all is one COPY, whose messages tell by their first byte what they are."""
    part = BASE
    for data in copied:
        kind = bytes(data[:1])
        if kind == b"d":
            yield part, data[1:]
        elif kind == b"n":
            name, path, _ = bytes(data[1:]).split(b"\0", 2)
            part = name.decode().removesuffix(".tar") if path else BASE
        elif kind == b"m":
            part = MANIFEST
