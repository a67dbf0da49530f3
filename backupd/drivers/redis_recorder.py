"""The recorder of a Redis server: its replication stream as a replica receives it, in pieces, with anchors beside it.

One thread does nothing but take what the server sends, into memory that is bounded, and reads the anchors; the other
stores. So a store that is slow or away never lets the server's output buffer for us grow: where the bound is reached
the link is closed, and what follows waits in the server's own backlog, from which it is fetched when there is room.

No dump is taken here, and none is ever asked for: the stream is joined where the server is. What a restore begins with
comes over a connection of its own (`RedisPitr.capture`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backupd.drivers._napping import let_more_come
from backupd.drivers.redis_retained import Held
from backupd.drivers.redis_stream import Moment
from backupd.drivers.redis_wire import Connection, RedisError
from backupd.model import LogSink, LogSpan

log = logging.getLogger(__name__)

PIECE = 8 << 20
"""Bytes after which a piece is stored, however young it is."""
BOUND = 64 << 20
"""Bytes that may wait to be stored."""
_ANCHOR_EVERY = 0.1  # seconds: how exactly an instant can be met
_ACK_EVERY = 1.0  # as replicas do; a server gives up one that is silent for a minute (repl-timeout)
_DEAF = 30.0  # seconds without a byte while the server moves on
_ANCHORS = 20_000  # that may wait; then every other one goes
_JOINS = 5  # tries to join a stream that runs away
_LOOKS = 50  # a tenth of a second apart


@dataclass(frozen=True, slots=True)
class Joined:
    """A stream that flows, from a position on."""

    link: Connection
    epoch: str
    position: int
    before: str = ""
    """The epoch that this one continues here, where it is another."""
    gap: str = ""
    """Why what follows does not continue what is stored; empty where it does."""


def join(connect: Callable[[], Connection], since: LogSpan | None) -> Joined:
    """Exactly where the repository ends, where the server still has what follows; else where the server is now.

    Raises RedisError, also for a replica that has not come to where the repository ends: it will.
    """
    gap = ""
    if since is not None:
        link = connect()
        with _closed_unless_kept(link) as keep:
            answer = link.follow(since.epoch, since.end)
            if answer.continues:
                keep()
                epoch = answer.epoch or since.epoch
                return Joined(link, epoch, since.end, since.epoch if epoch != since.epoch else "")
        gap = f"the server no longer has what follows {since.end} of {since.epoch}"
    for _ in range(_JOINS):
        moment, replica = _place(connect)
        epoch, position = moment.epoch, moment.position
        if replica and since is not None and epoch == since.epoch and position < since.end:
            raise RedisError(
                f"this replica is at {position}, and its log is stored up to {since.end}",
                hint="it was away, or was restarted with what it had on its disk; it is recorded when it has caught up",
            )
        link = connect()
        with _closed_unless_kept(link) as keep:
            if link.follow(epoch, position).continues:
                keep()
                return Joined(link, epoch, position, gap=gap)
    raise RedisError(
        "the server's replication stream cannot be joined: it runs out of its backlog at once",
        hint="CONFIG SET repl-backlog-size 64mb, and the same in redis.conf",
    )


@contextlib.contextmanager
def _closed_unless_kept(link: Connection) -> Iterator[Callable[[], None]]:
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        if not kept:
            link.close()


def _place(connect: Callable[[], Connection]) -> tuple[Moment, bool]:
    """Where the server is in its history, and whether that is a replica's. One that never had a replica keeps none: it
    is made to by asking for a dump, which is not waited for."""
    with connect() as server:
        said = server.info("replication")
        if said.get("repl_backlog_active") != "1":
            with connect() as asking:
                asking.call("REPLCONF", "capa", "eof")
                asking.send("PSYNC", "?", "-1")
                _await_backlog(server)
        return server.moment(), said.get("role") == "slave"


def _await_backlog(server: Connection) -> None:
    for _ in range(_LOOKS):
        if server.info("replication").get("repl_backlog_active") == "1":
            return
        time.sleep(0.1)
    raise RedisError(
        f"the Redis server at {server.address} sends no replication stream",
        hint="may the user PSYNC? is it a replica that has lost its master?",
    )


def _running(connect: Callable[[], Connection]) -> str:
    """The server's own name for this run of it."""
    with connect() as server:
        return server.info("server").get("run_id", "")


class RedisRecorder:
    """Implements `model.Recorder` for one server."""

    def __init__(
        self, connect: Callable[[], Connection], *, interval: float, bound: int = BOUND, piece: int = PIECE
    ) -> None:
        self._connect = connect
        self._interval = interval
        self._bound, self._piece = bound, piece
        self._inflow: _Inflow | None = None

    def held(self) -> Held | None:
        """What it has of the history now; None while it is not at work. For any thread."""
        inflow = self._inflow
        return inflow.held() if inflow is not None else None

    def record(self, since: LogSpan | None, sink: LogSink, stop: threading.Event) -> None:
        """Until stopped. Raises RedisError, and what the sink raises; what was not stored is in the server's backlog,
        if that is large enough.

        Where the server no longer has what follows, tells the gap and goes on behind it.
        """
        while not stop.is_set():
            joined = join(self._connect, since)
            with contextlib.closing(joined.link):
                sink.claim(_running(self._connect))
                if joined.gap:
                    sink.gap(joined.gap)
                if joined.before:
                    sink.begin(joined.before, joined.position)
                sink.begin(joined.epoch, joined.position)
                position = self._store(joined, sink, stop)
            since = LogSpan("", joined.epoch, position, position, None, 0)

    def _store(self, joined: Joined, sink: LogSink, stop: threading.Event) -> int:
        """Until stopped, or the link was given up for want of room: then the position reached."""
        with self._connect() as server:
            self._inflow = inflow = _Inflow(joined, server, self._bound)
            inflow.start()
            try:
                try:
                    while not (stop.wait(min(self._interval, _ANCHOR_EVERY)) or inflow.ended):
                        self._pass_on(inflow, sink, whole=False)
                finally:
                    inflow.stop()
                self._pass_on(inflow, sink, whole=True)
            finally:
                self._inflow = None
        if inflow.failure is not None and not stop.is_set():
            raise inflow.failure
        return inflow.stored

    def _pass_on(self, inflow: _Inflow, sink: LogSink, *, whole: bool) -> None:
        for moment in inflow.anchors():
            sink.anchor(moment.at, moment.position)
        while data := inflow.take(self._piece, 0.0 if whole else self._interval):
            sink.piece(inflow.stored, inflow.stored + len(data), data)
            inflow.stored += len(data)


class _Inflow:
    """The thread that takes what the server sends, and what waits to be stored of it."""

    def __init__(self, joined: Joined, server: Connection, bound: int) -> None:
        self.stored = joined.position
        self.failure: Exception | None = None
        self.ended = False
        self._link, self._server, self._epoch, self._bound = joined.link, server, joined.epoch, bound
        self._received = joined.position
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._since = 0.0  # when the first of what waits came
        self._anchors: list[Moment] = []
        self._unsent = 0  # the most that the server was ahead, since that was asked
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="redis stream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What came until now waits."""
        self._stop.set()
        self._thread.join()

    def anchors(self) -> list[Moment]:
        """Those that came since the last call."""
        with self._lock:
            found, self._anchors = self._anchors, []
        return found

    def held(self) -> Held:
        """What came, and how far the server was ahead of it at most since the last call."""
        with self._lock:
            unsent, self._unsent = self._unsent, 0
            return Held(self._epoch, self._received, not self.ended, unsent)

    def take(self, piece: int, age: float) -> bytes:
        """A piece of what waits, where that is so much or so old (in seconds); else nothing."""
        with self._lock:
            size = self._received - self.stored
            if not size or (size < piece and time.monotonic() - self._since < age):
                return b""
            taken: list[bytes] = []
            left = piece
            while self._waiting and (not taken or len(self._waiting[0]) <= left):
                taken.append(self._waiting.popleft())
                left -= len(taken[-1])
            self._since = time.monotonic()
        return b"".join(taken)

    # --- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._receive()
        except Exception as error:  # noqa: BLE001  raised again where it is stored
            self.failure = error
        self._link.close()  # at once: the server would go on collecting for us
        self.ended = True

    def _receive(self) -> None:
        anchored = acknowledged = 0.0
        behind = 0.0  # since when the server is ahead of what comes
        while not self._stop.is_set():
            now = time.monotonic()
            if now - anchored >= _ANCHOR_EVERY:
                ahead = self._anchor()
                anchored = time.monotonic()
                behind = (behind or now) if ahead else 0.0
                if behind and now - behind > _DEAF:
                    raise RedisError("nothing comes over the replication link", hint="is a firewall between?")
            data = self._link.stream(max(0.001, anchored + _ANCHOR_EVERY - now))
            now = time.monotonic()
            if data:
                behind = 0.0
                if not self._keep(data, now):
                    log.warning("the store is too slow: %d MiB wait, the rest stays with the server",
                                self._bound >> 20)  # fmt: skip
                    return
            if now - acknowledged >= _ACK_EVERY:
                # What is stored, not what came: so the server's own figures tell how far the backup is.
                self._link.send("REPLCONF", "ACK", str(self.stored))
                acknowledged = now
            if data:
                let_more_come(len(data))

    def _anchor(self) -> bool:
        """Whether the server is ahead of what came."""
        moment = self._server.moment()
        # A server that has just taken another history closes the link.
        if moment.epoch == self._epoch:
            with self._lock:
                self._unsent = max(self._unsent, moment.position - self._received)
                if moment.current:
                    self._anchors.append(moment)
                    if len(self._anchors) > _ANCHORS:
                        del self._anchors[::2]
        return moment.position > self._received

    def _keep(self, data: bytes, now: float) -> bool:
        """Whether there is room for more."""
        with self._lock:
            if self._received == self.stored:
                self._since = now
            self._waiting.append(data)
            self._received += len(data)
            return self._received - self.stored < self._bound
