"""The recorder of a PostgreSQL server: WAL from a physical slot, in pieces, with anchors beside it.

The server is told that WAL was flushed only when a piece of it is durable, so the slot never lets go of what is
not stored. Anchors hold for commits that were flushed when they were acknowledged: with `synchronous_commit = off`
the last moments before an anchor may lie behind it, as they may be lost in a crash.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any

from backupd.drivers.postgres_pace import Pace
from backupd.drivers.postgres_replication import (
    Replication,
    Server,
    ServerRefused,
    System,
    position_of,
    position_text,
    talking,
)
from backupd.drivers.postgres_slot import SLOT, ensure_slot, holding
from backupd.drivers.postgres_wal import epoch_parts
from backupd.model import LogSink, LogSpan

if TYPE_CHECKING:
    from psycopg import Connection, Notify

PIECE = 8 << 20
"""Bytes after which a piece is stored, however young it is."""
_ANCHOR_EVERY = 0.25
_BUSY = 128 << 10  # bytes a second: some hundred small transactions
_SLOT_LOOKS = 100  # a tenth of a second apart
_COMPARED = 8192  # bytes before where recording goes on: in a page of log are checksums, transactions, times
_TELLING = 512  # of them that are not 0: at the end of a segment that was switched there are none
_MOST = 32 << 20  # bytes: a segment of 16 MiB, and what was begun of the next
_ANSWERS = 30.0  # seconds
_QUIET = 1.0  # seconds without log: then a server that is shut down has sent what it had
_REST = 10.0  # seconds: at most so long it may send on
_REPORT_EVERY = 10.0  # seconds; a walsender gives up a receiver that is silent for a minute

ANCHOR = """
SELECT CASE WHEN pg_is_in_recovery()
         THEN least(clock_timestamp(), pg_last_xact_replay_timestamp()) ELSE clock_timestamp() END,
       (CASE WHEN pg_is_in_recovery()
         THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text
"""
"""The clock first, the position second. A standby knows only what it has replayed."""
RUNNING = "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint::text"
"""To the microsecond: a copy was started at another."""
SEGMENT_SIZE = "SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'"


# --- where to begin ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where recording goes on."""

    system: str
    timeline: int
    position: int
    gap: str = ""
    """Why what follows does not continue what is stored; empty where it does."""

    @property
    def epoch(self) -> str:
        return f"{self.system}-{self.timeline}"


def beginning(
    since: LogSpan | None, system: System, slot: int, segment: int, fork_of: Callable[[int], int | None]
) -> Beginning:
    """Exactly where the repository ends, where that is on this cluster's history; else at the front of the
    segment that the slot holds. `fork_of(timeline)`: where the server's history left that timeline. Pure.

    Raises ServerRefused for a server that is not as far as it was on the same timeline: the same positions would
    mean two things. One that only lags comes there by itself.
    """
    fresh = slot - slot % segment
    if since is None:
        return Beginning(system.identifier, system.timeline, fresh)
    identifier, timeline = epoch_parts(since.epoch)
    if identifier != system.identifier:
        return Beginning(
            system.identifier, system.timeline, fresh, f"this is another cluster than {identifier}"
        )
    if timeline == system.timeline:
        if since.end > system.position:
            raise _set_back(
                f"the server is at {position_text(system.position)}, before what was recorded of it"
            )
        return Beginning(identifier, timeline, since.end)
    fork = fork_of(timeline)
    if fork is None or since.end > fork:
        return Beginning(
            identifier, system.timeline, fresh, f"the server left timeline {timeline} before its end here"
        )
    return Beginning(identifier, timeline, since.end)


def comparable(position: int, held: int, segment: int) -> list[int]:
    """How many bytes before the position are worth comparing with what the server has there, least first: more where
    the fewer tell nothing. Pure. `held`: where its slot stands, whose segment the server has, and all behind.

    A slot that stands at the very position was told so by us once that was stored: it proves by itself that this is
    the same log, also at the front of a segment where those before may be gone. One that stands before it is of an
    older state of the server (or only of the slot, after a crash); all from there on can be compared. One behind it
    says nothing; where the segment before is gone, the server refuses, which is a gap.
    """
    inside = position % segment
    if held == position:
        return [min(inside, _COMPARED)]
    known = inside + segment if held > position else position - held // segment * segment
    return [min(inside, _COMPARED), min(known, _COMPARED), min(known, _MOST)]


def _tail(sink: LogSink, start: Beginning, held: int, segment: int) -> bytes:
    tail = b""
    for size in comparable(start.position, held, segment):
        if size > len(tail):
            tail = sink.tail(start.epoch, size)
        if len(tail) - tail.count(0) >= _TELLING:
            break
    return tail


def fork_of(history: str, timeline: int) -> int | None:
    """Where a history file says that a timeline was left. Pure."""
    for line in history.splitlines():
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) >= 2 and fields[0].strip() == str(timeline):
            return position_of(fields[1].strip())
    return None


class _OtherLog(ServerRefused):
    """Where recording would go on, the server has written something else."""


def _set_back(told: str) -> ServerRefused:
    return ServerRefused(
        told,
        hint="was it set back to an earlier state? promote it, so that it gets a timeline of its own, or give this "
        "source another name",
    )


# --- recording ---------------------------------------------------------------------------------------------


class PostgresRecorder:
    """Implements `model.Recorder` for one server."""

    def __init__(
        self, server: Callable[[], Server], slot: str, *, interval: float, catch_up: float = 0
    ) -> None:
        """`catch_up`: bytes a second at which a log that fell behind is read; 0 is no limit."""
        self._server = server
        self._slot = slot
        self._interval = interval
        self._catch_up = catch_up

    def record(self, since: LogSpan | None, sink: LogSink, stop: threading.Event) -> None:
        """Until stopped. Raises ServerRefused, and what the sink raises; what was not stored stays in the slot.

        Where the server has lost WAL that was not stored, or has left what is stored for a branch of its own, tells
        the gap and goes on behind it.
        """
        server = self._server()
        try:
            self._record(server, since, sink, stop, gap="")
        except ServerRefused as error:
            if stop.is_set() or not (error.log_is_gone or isinstance(error, _OtherLog)):
                raise
            self._drop_slot(server, stop)
            self._record(server, None, sink, stop, gap=error.message)

    def _drop_slot(self, server: Server, stop: threading.Event) -> None:
        """What was reported before the refusal has set it back to where the log is gone. The server's side of that
        stream may hold it a moment longer."""
        with talking(), contextlib.closing(server.connect()) as sql, server.replicate() as wire:
            for _ in range(_SLOT_LOOKS):
                row = sql.execute(SLOT, [self._slot]).fetchone()
                if row is not None and not row[1]:
                    wire.drop_slot(self._slot)
                if row is None or not row[1] or stop.wait(0.1):
                    return

    def _record(
        self, server: Server, since: LogSpan | None, sink: LogSink, stop: threading.Event, *, gap: str
    ) -> None:
        with (
            talking(),
            server.replicate() as wire,
            contextlib.closing(server.connect()) as sql,
            holding(sql, self._slot),
        ):
            held = ensure_slot(server, self._slot)
            system = wire.identify()
            row = sql.execute(SEGMENT_SIZE).fetchone()
            segment = int(row[0]) if row else 16 << 20
            history = wire.timeline_history(system.timeline)
            if since is not None and not since.epoch.startswith(f"{system.identifier}-"):
                # back from another cluster under this name, an upgrade that was given up: it goes on where it was left
                since = sink.last(lambda epoch: epoch.startswith(f"{system.identifier}-")) or since
            start = beginning(since, system, held, segment, lambda timeline: fork_of(history, timeline))
            flow = _Flow(wire, sql, sink, self._slot, self._interval, Pace(self._catch_up))
            same = since is not None and start.position == since.end and not gap and not start.gap
            tail = _tail(sink, start, held, segment) if same else b""
            try:
                flow.run(start, stop, gap or start.gap, tail)
            except _OtherLog as error:
                if start.timeline == system.timeline:
                    raise _set_back(error.message) from None
                raise  # it went on under a timeline of its own, whose positions are new


class _Flow:
    """One stream of WAL on its way into a sink."""

    def __init__(
        self,
        wire: Replication,
        sql: Connection[tuple[Any, ...]],
        sink: LogSink,
        slot: str,
        interval: float,
        pace: Pace,
    ) -> None:
        self._wire = wire
        self._sql = sql
        self._sink = sink
        self._slot = slot
        self._interval = interval
        self._pace = pace
        self._waiting: list[memoryview] = []
        self._size = 0
        self._since = 0.0  # when the first of what waits came
        self._stored = 0  # position
        self._anchored = 0.0
        self._seen = 0  # position of the server at the last anchor
        self._busy = False
        self._awaited = 0  # position that somebody waits for: see `ask_to_store`

    def run(self, start: Beginning, stop: threading.Event, gap: str, tail: bytes) -> None:
        """Until stopped, through every change of timeline. `tail`: what the server must have before the beginning.
        Nothing is told to the sink before the server sends: who comes second to a slot is refused there."""
        import psycopg

        system, timeline, position = start.system, start.timeline, start.position
        claimed = False
        self._listen()
        while True:
            streams = self._wire.start(self._slot, position - len(tail), timeline)
            self._compare(tail, position)
            tail = b""
            if not claimed:
                self._sink.claim(f"{system}-{self._running()}")
                claimed = True
            if gap:
                self._sink.gap(gap)
                gap = ""
            self._sink.begin(f"{system}-{timeline}", position)
            self._stored = position
            if streams:
                self._wire.report(position)
                try:
                    if self._stream(timeline, stop):
                        return
                except psycopg.Error:
                    self._take_the_rest()
                    raise
            timeline, position = self._wire.next_timeline()

    def _running(self) -> str:
        row = self._sql.execute(RUNNING).fetchone()
        return str(row[0]) if row else ""

    def _compare(self, tail: bytes, position: int) -> None:
        """What the server sends up to `position` is not stored again; what came behind it waits."""
        seen = bytearray()
        while len(seen) < len(tail):
            data = self._wire.receive(_ANSWERS)
            if data is None:
                self._wire.next_timeline()  # raises why: the log may be gone
            if not data:
                raise ServerRefused(f"the server does not send its log before {position_text(position)}")
            seen += data
        if seen[: len(tail)] != tail:
            raise _OtherLog(
                f"the server has another log before {position_text(position)} than what was recorded"
            )
        if len(seen) > len(tail):
            self._take(memoryview(seen)[len(tail) :])

    def _stream(self, timeline: int, stop: threading.Event) -> bool:
        """True when told to stop, False when the timeline has ended.

        A server sends its log at each commit, however slowly it is read: some thousand times a second, which took 16 %
        of a load that fills the processors. So a busy one is left for a moment whenever all of it was read, and sends
        in large pieces what came meanwhile (3 %). One that does little is not left: what is committed last before it
        is shut down waits in the stream until it is stored.
        """
        tick = min(self._interval, _ANCHOR_EVERY)
        reported = time.monotonic()
        left = False
        while not stop.is_set():
            self._anchor(tick)
            data = self._receive(tick, stop)
            now = time.monotonic()
            if data is None:
                if left and self._come_back(timeline, tick, stop):
                    left, reported = False, now
                    continue
                self._store()
                return False
            if data:
                self._take(data)
            awaited = self._stored < self._awaited <= self._stored + self._size
            if self._size >= PIECE or awaited or (self._waiting and now - self._since >= self._interval):
                self._store()
                reported = now
            elif now - reported >= _REPORT_EVERY:
                self._wire.report(self._stored)
                reported = now
            if self._busy and not left and self._wire.received >= self._seen:
                self._wire.leave()
                left = True
        self._store()
        return True

    def _come_back(self, timeline: int, tick: float, stop: threading.Event) -> bool:
        """After a moment; False where the timeline has ended meanwhile."""
        stop.wait(tick)
        self._anchor(0)
        if not self._wire.start(self._slot, self._wire.received, timeline):
            return False
        self._wire.report(self._stored)
        return True

    def _take_the_rest(self) -> None:
        """A server that is shut down ends its sessions first, and then sends what was committed until then."""
        ends = time.monotonic() + _REST
        with contextlib.suppress(ServerRefused), talking():
            while time.monotonic() < ends and (data := self._wire.receive(_QUIET)):
                self._take(data)
                if self._size >= PIECE:
                    self._store()
        with contextlib.suppress(ServerRefused), talking():  # nobody may be there to be told
            self._store()

    def _take(self, data: memoryview) -> None:
        self._since = self._since if self._waiting else time.monotonic()
        self._waiting.append(data)
        self._size += len(data)

    def _receive(self, tick: float, stop: threading.Event) -> memoryview | None:
        """As `Replication.receive`; nothing while it is too soon to read on."""
        if (wait := self._pace.wait(time.monotonic())) > 0:
            stop.wait(min(wait, tick))
            return memoryview(b"")
        data = self._wire.receive(tick)
        if data:
            self._pace.read(time.monotonic(), len(data), self._wire.received)
        return data

    def _listen(self) -> None:
        """What is told comes with the answers to other questions."""

        def told(what: Notify) -> None:
            if what.payload.isdecimal():
                self._awaited = max(self._awaited, int(what.payload))

        self._sql.add_notify_handler(told)
        with contextlib.suppress(ServerRefused), talking():  # a standby passes nothing on
            self._sql.execute(f"LISTEN {self._slot}".encode())

    def _anchor(self, tick: float) -> None:
        now = time.monotonic()
        passed = now - self._anchored
        if passed < tick:
            return
        self._anchored = now
        row = self._sql.execute(ANCHOR).fetchone()
        if row is not None and row[0] is not None and row[1] is not None:
            position = position_of(row[1])
            self._busy = bool(self._seen) and position - self._seen >= _BUSY * passed
            self._seen = position
            self._pace.seen(time.monotonic(), position)
            self._sink.anchor(row[0].astimezone(UTC), position)

    def _store(self) -> None:
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        self._sink.piece(self._stored, self._stored + len(data), data)
        self._waiting.clear()
        self._size = 0
        self._stored += len(data)
        self._wire.report(self._stored)
